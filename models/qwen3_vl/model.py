"""Qwen3-VL: token ids and packed images in, hidden states or logits out; whole rows at once, or through a cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.qwen3_vl.attention import Kernel
from models.qwen3_vl.cache import Cache, SharedPages
from models.qwen3_vl.config import Qwen3VLConfig, VisionConfig
from models.qwen3_vl.images import PackedImages
from models.qwen3_vl.layers import Precision, Remat, by_columns
from models.qwen3_vl.rope import text_rotation
from models.qwen3_vl.text import Decoder
from models.qwen3_vl.visibility import Visibility
from models.qwen3_vl.vision import VisionTower
from sharding import RULES, constrain

BY_COLUMN = replace(RULES, batch="data", tokens=None)
"""Where a device has some columns of every token, not all columns of some."""


class Qwen3VL(nnx.Module):
    """Qwen3-VL, dense or MoE; as transformers' `Qwen3VLForConditionalGeneration`, `Qwen3VLMoeForConditionalGeneration`.

    Parameters carry logical axis names (`axes`) that `sharding` maps to a mesh. Those of the layers are stacked
    (until they are `laid_out` for decoding).
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        remat: Remat = "full",
        kernel: Kernel = "xla",
    ):
        precision = Precision(compute=jnp.dtype(dtype), params=jnp.dtype(param_dtype))
        self.config = config
        self.dtype = precision.compute
        self.remat: Remat = remat
        self.kernel: Kernel = kernel
        text = config.text
        table = jax.random.normal(rngs.params(), (text.vocab_size, text.hidden_size), precision.params)
        self.embedding = nnx.Param(text.initializer_range * table, axes=("vocab", "embed"))
        # A text-only model of the same decoder has none.
        vision: VisionConfig | None = config.vision
        self.vision = None if vision is None else VisionTower(vision, precision=precision, rngs=rngs)
        self.decoder = Decoder(config, precision=precision, rngs=rngs)
        self.output = None if config.tie_word_embeddings else self._output_matrix(precision, rngs)
        self.turned_head: nnx.Param | None = nnx.data(None)
        """The output matrix as [vocab, embed], in a model that is `laid_out` for decoding."""

    def __call__(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens 3"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        prefix_ids: Int[Array, "batch tokens"] | None = None,
        images: PackedImages | None = None,
    ) -> Float[Array, "batch tokens vocab"]:
        """Logits in fp32; arguments as for `hidden_states`."""
        return self.logits(
            self.hidden_states(
                input_ids, positions=positions, segment_ids=segment_ids, prefix_ids=prefix_ids, images=images
            )
        )

    def hidden_states(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens 3"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        prefix_ids: Int[Array, "batch tokens"] | None = None,
        images: PackedImages | None = None,
        experts: Int[Array, "batch tokens layers chosen"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """Hidden states after the last norm, of all tokens at once.

        positions: M-RoPE positions; by default each row counts up (text only).
        segment_ids: tokens see only their own segment, 0 is padding; by default a row is one segment.
        prefix_ids: the other segment that a token sees (a prompt shared by several responses).
        experts: those that the tokens are to go through, as `extend` told them; by default the router chooses.
        """
        batch, length = input_ids.shape
        index = jnp.broadcast_to(jnp.arange(length), (batch, length))
        if positions is None:
            positions = jnp.broadcast_to(index[..., None], (batch, length, 3))
        visibility = Visibility(query_ids=segment_ids, prefix_ids=prefix_ids, key_ids=segment_ids, query_index=index)
        # Each device looks up its own columns of all tokens, and passes them on: nowhere is the whole table, nor its
        # gradient, and what is sent is as large as the tokens.
        x = constrain(self._looked_up(input_ids), "batch", "tokens", "embed", rules=BY_COLUMN)
        x, deepstack = self._with_images(constrain(x, "batch", "tokens", None), images)
        rotation = text_rotation(self.config.text, positions)
        return self.decoder(x, rotation, visibility, deepstack, experts, remat=self.remat, kernel=self.kernel)

    def extend(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens 3"],
        cache: Cache,
        table: Int[Array, "batch width"],
        start: Int[Array, " batch"],
        images: PackedImages | None = None,
        shared: SharedPages | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], Cache, Int[Array, "batch tokens layers chosen"] | None]:
        """Hidden states of tokens that continue each row at index `start`, the cache with them in it, and the experts
        that they went through (None in a model without).

        A part of a prompt, an appended turn and a decode step (one token) are all this. `table` names the pages of
        each row; a token sees them up to its own index, and what would be written past the last is dropped. In a decode
        step `shared` says which rows begin with the same pages.
        """
        index = start[:, None] + jnp.arange(input_ids.shape[1])
        x, deepstack = self._with_images(constrain(self._looked_up(input_ids), "batch", "tokens", None), images)
        rotation = text_rotation(self.config.text, positions)
        return self.decoder.extend(x, rotation, cache, table, index, deepstack, shared, kernel=self.kernel)

    def _output_matrix(self, precision: Precision, rngs: nnx.Rngs) -> nnx.Param:
        text = self.config.text
        matrix = jax.random.normal(rngs.params(), (text.hidden_size, text.vocab_size), precision.params)
        return nnx.Param(text.initializer_range * matrix, axes=("embed", "vocab"))

    @property
    def head(self) -> Float[Array, "embed vocab"]:
        """The output matrix; with tied embeddings, the embedding table transposed."""
        if self.turned_head is not None:
            return self.turned_head[...].T
        return self.embedding[...].T if self.output is None else self.output[...]

    def logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """fp32 logits of hidden states."""
        if self.turned_head is not None:
            rows = hidden.reshape(-1, hidden.shape[-1])
            return by_columns(rows, self.turned_head[...]).reshape(*hidden.shape[:-1], -1)
        return jnp.matmul(hidden, self.head.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def _looked_up(self, input_ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens embed"]:
        return self.embedding[...][input_ids].astype(self.dtype)

    def _with_images(
        self, x: Float[Array, "batch tokens embed"], images: PackedImages | None
    ) -> tuple[Float[Array, "batch tokens embed"], Float[Array, "depth batch tokens embed"] | None]:
        """Token embeddings with image features in their places, and the features that deepstack adds later."""
        if images is None:
            return x, None
        if self.vision is None:
            raise ValueError("images came with the tokens of a model that reads text only; expected None")
        features, deepstack = self.vision(images, remat=self.remat, kernel=self.kernel)
        is_image = (images.feature_index >= 0)[..., None]
        at = jnp.maximum(images.feature_index, 0)[..., None]

        def place(features: Array, elsewhere: Array | int) -> Array:
            return jnp.where(is_image, jnp.take_along_axis(features, at, axis=1).astype(self.dtype), elsewhere)

        x = constrain(place(features, x), "batch", "tokens", None)
        added = [place(features, 0) for features in deepstack[: self.config.deepstack_depth]]
        return x, jnp.stack(added) if added else None
