"""Families of segments -> one static batch of packed rows in micro-batches; of several processes, each its part."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from hdpo_jax.config import ConfigError, RLConfig, TrainConfig
from hdpo_jax.rollout.packing import Family, RowShape, assign_rows, fill_rows
from hdpo_jax.types import PackedRows
from models.policy import PolicyConfig
from sharding.multihost import agree, together

log = logging.getLogger(__name__)


class RowBatcher:
    """Packs mini-batches into arrays [mini, micro, rows, …] whose shape stays the same from batch to batch.

    Only the micro-batches in use are computed: room to spare costs memory (patches above all), not time. Where
    `train.max_rows` is 0 the first batch sets the room; a batch that needs more enlarges it, at the price of
    one compilation. A process packs what is its own, into its part of each micro-batch's rows.
    """

    def __init__(
        self,
        train: TrainConfig,
        model: PolicyConfig,
        *,
        fixed: bool = False,
        patch_dtype: DTypeLike = np.float32,
        experts: bool = False,
    ):
        """`fixed`: called from inside a program, where nothing grows and no process can ask another.

        `experts`: the rows say which experts their tokens are to go through.
        """
        processes = jax.process_count()
        if train.micro_batch_rows % processes:
            raise ConfigError(
                f"train.micro_batch_rows is {train.micro_batch_rows}; expected a multiple of the {processes} processes"
            )
        self._shape = RowShape(train.row_tokens, train.row_patches)
        self._rows = train.micro_batch_rows // processes
        self._all_rows = train.micro_batch_rows
        self._micro = -(-train.max_rows // train.micro_batch_rows)
        self._fixed = fixed
        self._settings: dict[str, Any] = {"patch_dtype": patch_dtype, "experts": experts}
        self.model = model

    @classmethod
    def of(cls, config: RLConfig, model: PolicyConfig, patch_dtype: DTypeLike) -> "RowBatcher":
        """What packs the rollouts of a run."""
        fixed, experts = config.rollout.mode == "fused", config.rollout.replay_experts
        return cls(config.train, model, fixed=fixed, patch_dtype=patch_dtype, experts=experts)

    def __call__(self, mini_batches: Sequence[Sequence[Family]]) -> tuple[PackedRows, Int[np.ndarray, " mini"]]:
        """The packed rows, and how many micro-batches of each mini-batch hold any, here or in another process."""
        with contextlib.nullcontext() if self._fixed else together():
            assigned = [assign_rows(families, self._shape) for families in mini_batches]
        needed = np.asarray([-(-len(rows) // self._rows) for rows in assigned], np.int32)
        if not self._fixed:
            needed = agree(needed).max(axis=0)
        self._make_room(int(needed.max()))
        count = self._micro * self._rows
        packed = [fill_rows(rows, count, self._shape, self.model, **self._settings) for rows in assigned]

        def stack(*leaves: np.ndarray) -> np.ndarray:
            return np.stack(leaves).reshape(len(leaves), self._micro, self._rows, *leaves[0].shape[1:])

        return jax.tree.map(stack, *packed), needed

    def _make_room(self, needed: int) -> None:
        if needed <= self._micro:
            return
        wanted, found = needed * self._all_rows, self._micro * self._all_rows
        if self._fixed:
            raise ConfigError(
                f"train.max_rows is {found}; expected at least {wanted}, which a batch takes: one program can not grow"
            )
        if self._micro:
            log.warning(
                "a batch needs %d rows and there is room for %d: compiling the step again; set train.max_rows",
                wanted,
                found,
            )
        self._micro = -(-needed * 5 // 4)
