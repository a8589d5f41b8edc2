"""The GPU benchmark runs to its end, tiny and on a CPU: its figures there mean nothing."""

import pytest

from tests.bench import gpu
from tests.bench.gpu_sizes import chip_of


@pytest.mark.slow
def test_both_sides_run(capsys):
    assert gpu.main("tiny") == 0
    printed = capsys.readouterr().out
    for row in ("decoded tokens/s (no torch.compile)", "HBM share of a decode step", "prefill MFU", "train step MFU"):
        assert f"| cpu: {row} |" in printed


def test_figures_of_a_machine_without_a_gpu_are_not_taken_for_those_of_one(capsys):
    assert gpu.main("4B") == 1
    assert capsys.readouterr().err == "JAX runs on 'cpu', torch on 'cpu'; expected both on one GPU\n"


def test_an_unknown_chip_is_named():
    assert chip_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    with pytest.raises(ValueError, match=r"^device 'Voodoo 2' is unknown; expected one of H200, H100"):
        chip_of("Voodoo 2")
