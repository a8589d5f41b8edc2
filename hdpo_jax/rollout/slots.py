"""The slots on the device: the rollout programs, and the state that each hands to the next."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.engine import Admission, Chunk, Extension, make_programs
from models.qwen3_vl import EncodedImage, KVCache, PackedImages, Qwen3VL
from models.qwen3_vl.images import feature_indices, pack_images
from models.qwen3_vl.processing import Processor


class Slots:
    """Programs and state of one model structure, on its mesh; parameters are given at each call.

    Every call must be inside `jax.set_mesh` of that mesh.
    """

    def __init__(
        self, model: Qwen3VL, processor: Processor, config: RolloutConfig, *, seed: int, stop_ids: Sequence[int]
    ):
        self._processor = processor
        self._config = config
        graphdef, _ = nnx.split(model)
        self._programs = make_programs(
            graphdef,
            model.config,
            config,
            seed=seed,
            stop_ids=stop_ids,
            forbidden=processor.forbidden,
            dtype=model.dtype,
        )
        self._state = self._programs.empty_state()

    def prefill(
        self,
        params: nnx.State,
        token_ids: Int[np.ndarray, "rows tokens"],
        positions: Int[np.ndarray, "rows tokens 3"],
        images: Sequence[Sequence[EncodedImage]],
        patches: int,
    ) -> KVCache:
        """Keys and values of padded prompts; the first rows have `images`, in a static room for `patches`."""
        return self._programs.prefill(params, token_ids, positions, self._packed(images, token_ids, patches))

    def fork(self, prompts: KVCache, admission: Admission) -> None:
        self._state = self._programs.fork(self._state, prompts, admission)

    def decode(self, params: nnx.State) -> Chunk:
        """Up to `config.chunk` tokens in every live slot, on the host."""
        self._state, chunk = self._programs.decode(params, self._state)
        return Chunk(*jax.device_get(chunk))

    def append(
        self, params: nnx.State, extension: Extension, images: Sequence[Sequence[EncodedImage]], patches: int
    ) -> None:
        packed = self._packed(images, np.asarray(extension.token_ids), patches)
        self._state = self._programs.append(params, self._state, extension, packed)

    def release(self) -> None:
        self._state = self._programs.release(self._state)

    def warm_up(self, params: nnx.State) -> None:
        """Compiles every program for every static shape, so that nothing compiles later."""
        # Twice: the state that a program returns may be laid out in another way than the empty one.
        for _ in range(2):
            self._run_every_program(params)

    def _run_every_program(self, params: nnx.State) -> None:
        config = self._config
        for tokens, patches in config.prompt_shapes:
            ids = np.zeros((config.prefill_rows, tokens), np.int32)
            prompts = self.prefill(params, ids, np.zeros((*ids.shape, 3), np.int32), (), patches)
            self.fork(prompts, nobody_admitted(config.slots))
        for tokens, patches in config.observation_shapes:
            self.append(params, nothing_added(config.append_rows, tokens, config.slots), (), patches)
        self.decode(params)
        self.release()

    def _packed(
        self, rows: Sequence[Sequence[EncodedImage]], token_ids: Int[np.ndarray, "rows tokens"], patches: int
    ) -> PackedImages | None:
        """Images at the rows' placeholder tokens, rows without any behind them; None where there is room for none."""
        if not patches:
            return None
        config = self._processor.config
        padded = [*rows, *[()] * (len(token_ids) - len(rows))]
        index = np.stack([feature_indices(ids, config.image_token_id) for ids in token_ids])
        return pack_images(config, padded, index, patches)


def nobody_admitted(slots: int) -> Admission:
    """An admission to fill in: NumPy arrays, which programs take as they take JAX's."""
    nobody = np.full(slots, -1, np.int32)
    arrays: list[Any] = [nobody, *(np.zeros(slots, np.int32) for _ in range(4)), np.zeros((slots, 3), np.int32)]
    return Admission(*arrays)


def nothing_added(rows: int, tokens: int, slots: int) -> Extension:
    """An extension to fill in, all its rows padding."""
    nobody, ids, positions = np.full(rows, slots, np.int32), np.zeros((rows, tokens), np.int32), (rows, tokens, 3)
    arrays: list[Any] = [nobody, ids, np.zeros(positions, np.int32), *(np.zeros(rows, np.int32) for _ in range(3))]
    return Extension(*arrays)
