"""Qwen3 (dense, text only): the decoder of Qwen3-VL by itself."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.qwen3.config import Qwen3Config
from models.qwen3_vl.attention import Kernel
from models.qwen3_vl.images import PackedImages
from models.qwen3_vl.layers import Precision, Remat
from models.qwen3_vl.model import Qwen3VL
from models.qwen3_vl.text import Decoder
from sharding import constrain


class Qwen3(Qwen3VL):
    """Qwen3-VL without its vision tower; numerically transformers' `Qwen3ForCausalLM`.

    Of a text M-RoPE's three positions are one number, and rotate as the plain rotary embedding does.
    """

    def __init__(
        self,
        config: Qwen3Config,
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
        self.decoder = Decoder(config, precision=precision, rngs=rngs)
        self.output = None if config.tie_word_embeddings else self._output_matrix(precision, rngs)
        self.turned_head: nnx.Param | None = nnx.data(None)

    def _embed(
        self, input_ids: Int[Array, "batch tokens"], images: PackedImages | None
    ) -> tuple[Float[Array, "batch tokens embed"], None]:
        if images is not None:
            raise ValueError("images came with the tokens of a Qwen3, which reads text only; expected None")
        return constrain(self.embedding[...][input_ids].astype(self.dtype), "batch", "tokens", None), None
