"""The scripts of launch/ do what their first lines say."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "cpu_mesh.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_cpu_mesh_gives_as_many_devices_as_asked_for(tmp_path: Path):
    config = tmp_path / "count.py"
    config.write_text("import jax\n\ndef get_config():\n    raise ValueError(f'{jax.device_count()} devices')\n")
    outcome = run("5", "train", str(config))
    assert outcome.returncode == 2
    assert outcome.stderr.strip().endswith("ValueError: 5 devices")


def test_cpu_mesh_says_how_it_is_used():
    for arguments in ((), ("8",), ("eight", "train"), ("0", "train")):
        outcome = run(*arguments)
        assert outcome.returncode == 2 and outcome.stderr.startswith("usage: ")
