"""Our side of the update benchmark: the rows and the program of a run."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hdpo_jax.algorithm.state import init_state
from hdpo_jax.algorithm.update import UpdateBatch, make_update
from hdpo_jax.config import AlgorithmConfig, OptimizerConfig, TrainConfig
from hdpo_jax.rollout.packing import padding_share
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.optimizer import make_optimizer
from models.qwen3_vl import load_hf
from models.qwen3_vl.layers import Remat
from tests.bench.trajectories import families
from tests.bench.workload import FIRST_SPECIAL, Sizes, draw


class Trainer:
    """Parameters, optimizer and a packed batch; `step` does one update."""

    def __init__(self, directory: str, sizes: Sizes, mini_batches: int, train: TrainConfig, remat: Remat):
        work = draw(sizes)
        model = load_hf(directory, dtype=jnp.float32, remat=remat)
        groups = families(work, model.config)
        each = len(groups) // mini_batches
        rows, micro_batches = RowBatcher(train, model.config)(
            [groups[at : at + each] for at in range(0, len(groups), each)]
        )
        self.padding = padding_share(rows, micro_batches)
        self.positions = int(micro_batches.sum()) * train.micro_batch_rows * train.row_tokens
        usable = np.ones(work.accuracy.shape, bool)
        calls, correct = 1 - work.tool, work.accuracy > 0.5
        arrays: list[Any] = [rows, micro_batches, work.accuracy, work.tool, calls, correct, usable]
        self._batch = jax.device_put(UpdateBatch(*arrays))
        graphdef, params = nnx.split(model)
        optimizer = make_optimizer(OptimizerConfig(), 1, params)
        forbidden = np.arange(model.config.text.vocab_size) >= FIRST_SPECIAL
        self._update = make_update(graphdef, optimizer, AlgorithmConfig(), temperature=1.0, forbidden=forbidden)
        self._state = init_state(params, optimizer)

    def step(self) -> Mapping[str, Any]:
        self._state, metrics = self._update(self._state, self._batch)
        return jax.device_get(dict(metrics))


@functools.cache
def trainer(directory: str, sizes: Sizes, mini_batches: int, train: TrainConfig, remat: Remat) -> Trainer:
    return Trainer(directory, sizes, mini_batches, train, remat)


def first(*given: Any) -> dict[str, float]:
    """The first update: what it found, and how long it took with its compilation."""
    ours = trainer(*given)
    started = time.perf_counter()
    metrics = ours.step()
    return {
        "loss": float(metrics["loss/total"]),
        "grad_norm": float(metrics["optimizer/grad_norm"]),
        "nll": float(metrics["policy/logprob_gap_mean"]),
        "seconds": time.perf_counter() - started,
        "padding": ours.padding,
        "positions": ours.positions,
    }


def again(*given: Any) -> float:
    """Seconds of a further update."""
    ours = trainer(*given)
    started = time.perf_counter()
    ours.step()
    return time.perf_counter() - started
