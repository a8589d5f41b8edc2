"""One GPU, Qwen3-VL-4B's dimensions with random weights, bf16, text alone: sampling 256 tokens in 64 rows after prompts
of 2,048, and a supervised step over 8 rows of 4,096. Ours against transformers with torch (SDPA, torch.compile over a
static cache where that works), each side in a process of its own, one after the other. HBM share: bytes of weights and
of cached keys and values, over what the chip could read in that time; MFU: the model's operations, over what the chip
could do.

python -m tests.bench.gpu [--size 4B]
"""

import argparse
import sys

from tests.bench.child import Child
from tests.bench.gpu_sizes import SIZES, Chip, Sizes, chip_of
from tests.bench.table import Row, markdown


def main(size: str) -> int:
    # Here and not above: a child imports this module too, and each side is to have its own libraries only.
    from tests.bench import gpu_ours, gpu_torch

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
    # A process for each: what one leaves in the device's memory, the next would lack.
    with Child() as child:
        ours = child.call(gpu_ours.decode, sizes)
    with Child() as child:
        peer = child.call(gpu_torch.decode, config, sizes)
    with Child() as child:
        learned = child.call(gpu_ours.learn, sizes)
    with Child() as child:
        peer_step = child.call(gpu_torch.learn, config, sizes)
    print(markdown(table(name, sizes, chip, ours, peer, learned, peer_step)))
    return 0


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
