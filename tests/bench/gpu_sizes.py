"""What the GPU benchmark computes on, and what a chip can do."""

from dataclasses import dataclass

ROUNDS = 3
"""Of which the median counts; one more before, which compiles."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Text alone, random tokens; every row as long as the others."""

    model: str
    """A published size; "tiny" is for a machine without a GPU."""
    rows: int
    prompt: int
    new_tokens: int
    learned_rows: int
    learned_tokens: int


SIZES = {
    "4B": Sizes(model="4B", rows=64, prompt=2_048, new_tokens=256, learned_rows=8, learned_tokens=4_096),
    "tiny": Sizes(model="tiny", rows=2, prompt=32, new_tokens=8, learned_rows=2, learned_tokens=64),
}


@dataclass(frozen=True, kw_only=True)
class Chip:
    flops: float
    """Dense bf16 operations a second."""
    bandwidth: float
    """Bytes a second, of its memory."""


# The makers' data sheets; of an H100 the SXM version.
CHIPS = {
    "H200": Chip(flops=989e12, bandwidth=4.8e12),
    "H100": Chip(flops=989e12, bandwidth=3.35e12),
    "A100": Chip(flops=312e12, bandwidth=2.0e12),
    "cpu": Chip(flops=1e12, bandwidth=50e9),
}
"""By what a device's name contains. "cpu" is there so that the benchmark can be tried: no figure of it counts."""


def chip_of(name: str) -> Chip:
    """The chip whose name this is; ValueError for an unknown one."""
    found = next((chip for known, chip in CHIPS.items() if known in name), None)
    if found is None:
        raise ValueError(f"device {name!r} is unknown; expected one of {', '.join(CHIPS)} (tests/bench/gpu_sizes.py)")
    return found
