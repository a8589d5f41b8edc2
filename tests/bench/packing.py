"""512 trajectories of log-normal length (median 400, sigma 0.8, at most 2,048 sampled tokens), prompts of 300 tokens
with an image of 256 x 256, shared by groups of 8, in two mini-batches: packed by first-fit-decreasing as a run packs
them into micro-batches of 4 rows of 4,096, against a trajectory a row, padded to the longest of its micro-batch of 8.

python -m tests.bench.packing
"""

import time
from collections.abc import Sequence

import numpy as np

from hdpo_jax.config import TrainConfig
from hdpo_jax.rollout.packing import padding_share
from hdpo_jax.train.batching import RowBatcher
from models.qwen3_vl import Qwen3VLConfig
from tests.bench.table import Row, markdown
from tests.bench.trajectories import families
from tests.bench.workload import MODEL, Rollout, Sizes, draw

SIZES = Sizes(prompts=64, samples=8, prompt_tokens=300, image_side=256, median=400, sigma=0.8, longest=2_048)
TRAIN = TrainConfig(row_tokens=4_096, row_patches=512, micro_batch_rows=4)
MINI_BATCHES = 2
PEER_ROWS = 8


def main() -> None:
    work, config = draw(SIZES), Qwen3VLConfig.from_hf({"model_type": "qwen3_vl", **MODEL})
    batcher = RowBatcher(TRAIN, config)
    started = time.perf_counter()
    groups = families(work, config)
    each = len(groups) // MINI_BATCHES
    rows, micro_batches = batcher([groups[at : at + each] for at in range(0, len(groups), each)])
    seconds = time.perf_counter() - started
    positions = int(micro_batches.sum()) * TRAIN.micro_batch_rows * TRAIN.row_tokens
    assert rows.images is not None
    patches = int((np.asarray(rows.images.segment_ids) > 0).sum())
    room = int(micro_batches.sum()) * TRAIN.micro_batch_rows * TRAIN.row_patches
    tokens = sum(len(rollout.token_ids) for rollout in work.rollouts)
    padded, unshared = padded_positions(work.rollouts), sum(len(work.patches[r.group]) for r in work.rollouts)
    print(f"{tokens} tokens in {len(work.rollouts)} trajectories; {micro_batches.sum()} rows of {TRAIN.row_tokens}")
    table = [
        Row(
            "padding in packed rows",
            100 * padding_share(rows, micro_batches),
            100 * (1 - tokens / padded),
            None,
            "<= 10 %",
            "%",
        ),
        Row("tokens that a batch computes", positions, padded, padded / positions),
        Row("image patches that a batch computes", room, unshared, unshared / room),
        Row("padding in packed image patches", 100 * (1 - patches / room), 0.0, unit="%"),
        Row("packing a batch, images along", seconds, unit="s"),
    ]
    print(markdown(table))


def padded_positions(rollouts: Sequence[Rollout]) -> int:
    """A trajectory a row, in the order of the batch, each micro-batch as long as its longest."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    return sum(PEER_ROWS * max(lengths[at : at + PEER_ROWS]) for at in range(0, len(lengths), PEER_ROWS))


if __name__ == "__main__":
    main()
