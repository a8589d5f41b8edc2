"""One update (old log-probs, advantages of both channels, clipped loss, gradients, clipping, AdamW) on the same
rollouts with the same weights, fp32, all cores: ours on packed rows that share prompts, against transformers with torch
autograd on rollouts sorted by length and padded to the longest of their micro-batch. 55M parameters; 4 prompts of 256
tokens with an image of 256 x 256, 8 rollouts each, 128 sampled tokens in the median, 2 mini-batches.

python -m tests.bench.update [--rounds 3]
"""

import argparse
import sys
import tempfile
from statistics import median

from tests.bench.child import Child, median_ratio, take_turns
from tests.bench.table import Row, markdown
from tests.bench.workload import Sizes, draw, write_model

SIZES = Sizes(prompts=4, samples=8, prompt_tokens=256, image_side=256, median=128, sigma=0.6, longest=384, observed=24)
MINI_BATCHES = 2
ROW_TOKENS, ROW_PATCHES, MICRO_BATCH_ROWS = 1_024, 256, 1
PEER_ROWS = 8


def main(rounds: int) -> int:
    # Here and not above: a child imports this module too, and each side is to have its own libraries only.
    from hdpo_jax.config import TrainConfig
    from tests.bench import update_ours, update_torch

    train = TrainConfig(row_tokens=ROW_TOKENS, row_patches=ROW_PATCHES, micro_batch_rows=MICRO_BATCH_ROWS)
    with tempfile.TemporaryDirectory() as model, Child() as ours, Child() as peer:
        with Child() as writer:
            print(f"{writer.call(write_model, model) / 1e6:.1f}M parameters", flush=True)
        for_ours, for_peer = (model, SIZES, MINI_BATCHES, train, "nothing"), (model, SIZES, MINI_BATCHES, PEER_ROWS)
        found = ours.call(update_ours.first, *for_ours)
        expected = peer.call(update_torch.first, *for_peer)
        print(f"ours first: {found}\npeer first: {expected}", flush=True)
        if not agree(found, expected):
            print("the two sides do not compute the same: nothing to compare", file=sys.stderr)
            return 1

        def timed(name: str, seconds: float) -> float:
            print(f"{name} {seconds:.1f} s", flush=True)
            return seconds

        times = take_turns(
            {
                "ours": lambda: timed("ours", ours.call(update_ours.again, *for_ours)),
                "peer": lambda: timed("peer", peer.call(update_torch.again, *for_peer)),
            },
            rounds,
        )
        peaks = ours.peak_bytes() / 1e9, peer.peak_bytes() / 1e9
    print(markdown(table(found, expected, times, peaks)))
    return 0


def agree(ours: dict[str, float], peer: dict[str, float]) -> bool:
    """Both sides learn the same: loss to 1e-4, gradient norm and log-likelihood to a thousandth."""
    relative = (abs(ours[name] - peer[name]) / abs(peer[name]) for name in ("grad_norm", "nll"))
    return abs(ours["loss"] - peer["loss"]) < 1e-4 and max(relative) < 1e-3


def table(
    ours: dict[str, float], peer: dict[str, float], times: dict[str, list[float]], peaks: tuple[float, float]
) -> list[Row]:
    seconds = median(times["ours"]), median(times["peer"])
    ratio = median_ratio(times["peer"], times["ours"])
    sampled = draw(SIZES).sampled_tokens
    exact = [
        Row(f"{what} of the first update", f"{ours[name]:.5f}", f"{peer[name]:.5f}")
        for what, name in (("loss", "loss"), ("gradient norm", "grad_norm"), ("negative log-likelihood", "nll"))
    ]
    return [
        Row("an update", *seconds, ratio, ">= 2x", unit="s"),
        Row("sampled tokens/s of an update", sampled / seconds[0], sampled / seconds[1], ratio),
        Row("peak memory of an update's process", *peaks, peaks[1] / peaks[0], unit="GB"),
        Row("tokens an update computes", ours["positions"], peer["positions"], peer["positions"] / ours["positions"]),
        Row("padding in an update's rows", 100 * ours["padding"], 100 * peer["padding"], unit="%"),
        Row("the first update, compiled on the way", ours["seconds"], peer["seconds"], unit="s"),
        *exact,
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the update step against transformers and torch")
    parser.add_argument("--rounds", type=int, default=3)
    sys.exit(main(parser.parse_args().rounds))
