"""The command line: help is there, every refusal is one readable line, and the exit code says which kind."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configs import signs_hdpo
from hdpo_jax import cli, commands, config_files
from hdpo_jax.cli import describe, main
from hdpo_jax.config import ConfigError, RLConfig, SFTConfig
from hdpo_jax.config_files import config_names, find_config, load_config
from hdpo_jax.errors import Stopped

CONFIG = """\
from hdpo_jax.config import *

def get_config():
    return RLConfig(output="runs/x", model=ModelConfig(path="m"), data=DataConfig(path="d"))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RLConfig]:
    """The configs that `hdpo train` would have trained with."""
    from hdpo_jax.train import rl
    from hdpo_jax.train.loop import RunResult

    configs: list[RLConfig] = []

    def train(config: RLConfig) -> RunResult:
        configs.append(config)
        return RunResult(steps=config.train.steps, stopped_by=0, seconds=0.0, compilations_after_warmup=0)

    monkeypatch.setattr(rl, "train_rl", train)
    return configs


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line that `hdpo` says on stderr when it refuses."""
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("hdpo: ")
    return captured.err.removeprefix("hdpo: ").strip()


def test_help_lists_every_command_and_waits_for_no_accelerator():
    code = "import sys; from hdpo_jax.cli import main; main(['--help']); sys.exit('jax' in sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr
    for name in [*commands.COMMANDS, *commands.RUNS, *commands.GROUPS]:
        assert f"\n  {name} " in outcome.stdout


@pytest.mark.parametrize("name", [*commands.COMMANDS, *commands.RUNS])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: hdpo {name}" in capsys.readouterr().out


def test_module_runs_as_a_program():
    outcome = subprocess.run(
        [sys.executable, "-m", "hdpo_jax", "nonsense"], capture_output=True, text=True, timeout=300, check=False
    )
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("hdpo: there is no command 'nonsense'; expected one of sft, train, ")


def test_flags_override_fields_of_the_file(config: Path, started: list[RLConfig]):
    flags = ["--train.steps", "50", "--train.mini_batches", "4", "--tools.sandbox", "none", "--tools.names", "a", "b"]
    assert cli.main(["train", str(config), *flags]) == 0
    assert started[0].train.steps == 50 and started[0].train.mini_batches == 4
    assert started[0].tools.sandbox == "none" and started[0].tools.names == ("a", "b")
    assert started[0].model.path == "m"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--train.stepz", "5"], "Unrecognized options: --train.stepz, 5; there is --train.steps INT"),
        (["--train.steps", "many"], "--train.steps: invalid literal for int() with base 10: 'many'"),
        (["--train.steps"], "Missing value for argument '--train.steps'"),
        (["--tools.sandbox", "jail"], "invalid choice 'jail' for argument '--tools.sandbox'"),
        (["--train.mini-batches", "7"], "train: train.mini_batches is 7; expected a divisor of"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    config: Path, flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert refusal(["train", str(config), *flags], capsys).startswith(line)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("output=", "outptu=", ":4: RLConfig got an unexpected field 'outptu'"),
        ('output="runs/x", ', "", ":4: RLConfig missing 1 required field: 'output'"),
        ('"runs/x"', "3", ": output is 3; expected str"),
        ('path="d"', 'path="d", workers="2"', ": data.workers is '2'; expected int"),
        ('path="d"', 'path="d", workers=True', ": data.workers is True; expected int"),
        ('path="d"', 'path="d", max_bad_rows=7', ":4: data.max_bad_rows is 7; expected a share from 0 to 1"),
        ('path="m"', 'path="m", dtype="f8"', ": model.dtype is 'f8'; expected one of 'bfloat16', 'float32'"),
        ('ModelConfig(path="m")', '"m"', ": model is 'm'; expected ModelConfig"),
        ("RLConfig(", "SFTConfig(", ": get_config() gives SFTConfig; this command takes RLConfig"),
        ("get_config", "config", ": defines no get_config(); expected `def get_config() -> RLConfig`"),
        ("def ", "fed ", ":3: SyntaxError: "),
        ("return ", "return 1 / 0 or ", ":4: ZeroDivisionError: division by zero"),
        ("hdpo_jax.config", "hdpo_jax.configs", ":1: ModuleNotFoundError: No module named 'hdpo_jax.configs'"),
    ],
)
def test_config_that_is_not_sound_is_refused(
    config: Path, old: str, new: str, line: str, capsys: pytest.CaptureFixture[str]
):
    assert old in CONFIG
    config.write_text(CONFIG.replace(old, new))
    assert refusal(["train", str(config)], capsys).startswith(f"{config}{line}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "hdpo train CONFIG: a config comes first"),
        (["train", "--train.steps", "5"], "hdpo train CONFIG: a config comes first"),
        (["train", "/nowhere/x.py"], "there is no config file /nowhere/x.py"),
        (["trane"], "there is no command 'trane'"),
        (["report"], "missing RUN-DIR; see hdpo report --help"),
        (["score", "--model", "m"], "missing --messages PATH, --output PATH"),
        (["eval", "--data", "d", "--output", "o"], "expected one of --model and --run-dir"),
        (["eval", "--data", "d", "--output", "o", "--model", "m", "--run-dir", "r"], "expected one of"),
        (["quickstart", "--seed", "x"], "--seed: invalid literal"),
    ],
)
def test_what_a_command_can_not_take_is_refused(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    assert refusal(arguments, capsys).startswith(line)


def test_refusal_on_a_terminal_is_plain_too(config: Path):
    # On a terminal tyro draws its complaint in colours and frames.
    script = f"{sys.executable} -m hdpo_jax train {config} --train.stepz 5"
    command = ["script", "-qec", script, "/dev/null"]
    outcome = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"TERM": "xterm"}
    )
    assert outcome.returncode == 2
    assert outcome.stdout.startswith("hdpo: Unrecognized options: --train.stepz, 5; there is --train.steps INT; see ")
    assert "\x1b" not in outcome.stdout and outcome.stdout.count("\n") == 1


def test_other_errors_are_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert refusal(["report", str(tmp_path)], capsys, status=1).startswith(f"{tmp_path} holds neither summary.json")


def test_debug_shows_the_traceback(tmp_path: Path):
    with pytest.raises(ValueError, match="neither summary.json"):
        cli.main(["report", str(tmp_path), "--debug"])


def test_interruption_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.Report, "run", interrupt)
    assert refusal(["report", "x"], capsys, status=130) == "interrupted"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("bad\n  thing"), "bad thing"),
        (RuntimeError(""), "RuntimeError"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_errors_are_described_in_one_line(error: Exception, line: str):
    assert cli.describe(error) == line


def test_very_long_errors_are_cut():
    assert len(cli.describe(RuntimeError("very long " * 1_000))) < 700


def test_names_come_from_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config_files, "CONFIGS", tmp_path)
    (tmp_path / "quick.py").write_text(CONFIG)
    (tmp_path / "_shared.py").write_text("")
    assert config_names() == ["quick"]
    assert load_config("quick", RLConfig).output == "runs/x"
    with pytest.raises(ConfigError, match="there is no run named 'quik'; did you mean 'quick'?"):
        find_config("quik")
    with pytest.raises(ConfigError, match="configs/ has: quick"):
        find_config("zzz")


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_loads_and_says_what_it_is(name: str):
    path = find_config(name)
    kinds = (SFTConfig, RLConfig)
    loaded = []
    for kind in kinds:
        try:
            loaded.append(load_config(str(path), kind))
        except ConfigError as error:
            assert "this command takes" in str(error)
    assert len(loaded) == 1
    assert textwrap.dedent(path.read_text()).startswith('"""')


def test_running_out_of_memory_names_what_to_lower():
    # As XLA says it, several lines and a trace along.
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 52000000000 bytes.\n  BufferAssignment: ...")
    line = describe(error)
    assert line.startswith("out of memory: a program asked for 52.0 GB; lower")
    assert "rollout.capacity" in line and "\n" not in line


def test_a_stopped_run_says_how_to_go_on(monkeypatch, capsys):
    def stop(arguments):
        raise Stopped("stopped at step 3 of runs/a, which is saved; the same command goes on from there", 15)

    monkeypatch.setattr("hdpo_jax.cli.dispatch", stop)
    assert main(["train", "a"]) == 143
    assert capsys.readouterr().err.startswith("hdpo: stopped at step 3 of runs/a")


def test_eval_takes_the_settings_of_a_run_and_flags_override_them(tmp_path, monkeypatch):
    config = signs_hdpo.get_config()
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    seen = []
    monkeypatch.setattr("hdpo_jax.commands.Eval.run", lambda command: seen.append(command))
    main(["eval", "--run-dir", str(tmp_path), "--data", "d", "--output", "o", "--rollout.slots", "8"])
    (command,) = seen
    assert command.agent == config.agent
    assert command.rollout == dataclasses.replace(config.rollout, slots=8)
    assert main(["eval", "--model", "m", "--settings", str(tmp_path / "no"), "--data", "d", "--output", "o"]) == 2
