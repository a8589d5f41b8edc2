"""One GPU, Qwen3-VL-4B's dimensions with random weights, bf16, text alone: sampling 256 tokens in 64 rows after prompts
of 2,048, and a supervised step over 8 rows of 4,096. Ours against transformers with torch (SDPA, torch.compile over a
static cache where that works), each side in a process of its own, one after the other. HBM share: bytes of weights and
of cached keys and values, over what the chip could read in that time; MFU: the model's operations, over what the chip
could do.

python -m tests.bench.gpu [--size 4B]
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.bench.child import Child
from tests.bench.gpu_sizes import SIZES, Chip, Sizes, chip_of
from tests.bench.table import Row, markdown


def main(size: str) -> int:
    # Here and not above: a child imports this module too, and each side is to have its own libraries only.
    from tests.bench import gpu_ours, gpu_torch

    # Of the device's memory: JAX takes three quarters unless told, and the step needs more of some devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    sizes = SIZES[size]
    with Child() as child, Child() as other_child:
        name, config = child.call(gpu_ours.device), child.call(gpu_ours.config_of, sizes)
        other = other_child.call(gpu_torch.name)
    try:
        chip = chip_of(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if name != other or (name == "cpu" and size != "tiny"):
        print(f"JAX runs on {name!r}, torch on {other!r}; expected both on one GPU", file=sys.stderr)
        return 1
    ours = alone("JAX: prefill and decode", gpu_ours.decode, sizes)
    learned = alone("JAX: train step", gpu_ours.learn, sizes)
    peer = alone("torch: prefill and decode", gpu_torch.decode, config, sizes)
    peer_step = alone("torch: train step", gpu_torch.learn, config, sizes)
    print(markdown(table(name, sizes, chip, ours, peer, learned, peer_step)))
    return 0


def alone(what: str, measured: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: what one leaves in the device's memory, the next would lack. Says what it found."""
    started = time.monotonic()
    with Child() as child:
        found = child.call(measured, *arguments)
    print(f"{what}: {found} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return found


def table(
    name: str,
    sizes: Sizes,
    chip: Chip,
    ours: dict[str, float],
    peer: dict[str, float],
    learned: dict[str, float],
    peer_step: float,
) -> list[Row]:
    def against(what: str, ours: float, peer: float, need: float, limit: float) -> Row:
        """A share of what the chip could do, from seconds."""
        return Row(f"{name}: {what}", 100 * need / limit / ours, 100 * need / limit / peer, peer / ours, unit="%")

    step, peers = ours["decode"], peer["decode"]
    how = "torch.compile" if peer["compiled"] else "no torch.compile"
    return [
        Row(f"{name}: decoded tokens/s ({how})", sizes.rows / step, sizes.rows / peers, peers / step),
        against("HBM share of a decode step", step, peers, ours["decode_bytes"], chip.bandwidth),
        against("prefill MFU", ours["prefill"], peer["prefill"], ours["prefill_flops"], chip.flops),
        against("train step MFU", learned["seconds"], peer_step, learned["flops"], chip.flops),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one GPU against transformers and torch")
    parser.add_argument("--size", choices=SIZES, default="4B")
    sys.exit(main(parser.parse_args().size))
