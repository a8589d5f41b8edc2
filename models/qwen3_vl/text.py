"""The decoder: stacked layers with grouped-query attention, scanned, with or without a cache."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.policy import PolicyConfig
from models.qwen3_vl.attention import Kernel, attention, paged_attention
from models.qwen3_vl.cache import Cache, SharedPages
from models.qwen3_vl.config import MoEConfig, TextConfig
from models.qwen3_vl.layers import ACTIVATION_FUNCTIONS, Linear, Precision, Remat, RMSNorm, stack
from models.qwen3_vl.moe import SparseMLP
from models.qwen3_vl.rope import Rotation, rotate
from models.qwen3_vl.runs import LayerRuns, scan_runs
from models.qwen3_vl.visibility import Visibility
from sharding import constrain

_Extended = tuple[Array, Cache, Array | None]
"""Hidden states, the cache with their keys and values, and the experts of the layers so far."""


class TextLayer(nnx.Module):
    """Pre-norm decoder layer: attention with normed queries and keys, then a gated MLP, or a mixture of them."""

    def __init__(self, config: TextConfig, *, moe: MoEConfig | None, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        width, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        common = {"std": config.initializer_range, "precision": precision, "rngs": rngs}
        norm = {"epsilon": config.rms_norm_eps, "precision": precision}
        bias = config.attention_bias
        self.attention_norm = RMSNorm(width, **norm)
        self.query = Linear((width,), (heads, size), axes=("embed", "heads", "head_dim"), bias=bias, **common)
        self.key = Linear((width,), (kv_heads, size), axes=("embed", "kv_heads", "head_dim"), bias=bias, **common)
        self.value = Linear((width,), (kv_heads, size), axes=("embed", "kv_heads", "head_dim"), bias=bias, **common)
        self.out = Linear((heads, size), (width,), axes=("heads", "head_dim", "embed"), bias=bias, **common)
        self.query_norm = RMSNorm(size, **norm)
        self.key_norm = RMSNorm(size, **norm)
        self.mlp_norm = RMSNorm(width, **norm)
        self.experts = None if moe is None else SparseMLP(config, moe, precision=precision, rngs=rngs)
        if moe is None:
            hidden = config.intermediate_size
            self.gate = Linear((width,), (hidden,), axes=("embed", "mlp"), bias=False, **common)
            self.up = Linear((width,), (hidden,), axes=("embed", "mlp"), bias=False, **common)
            self.down = Linear((hidden,), (width,), axes=("mlp", "embed"), bias=False, **common)

    def queries_keys_values(
        self, x: Float[Array, "batch tokens embed"], rotation: Rotation
    ) -> tuple[
        Float[Array, "batch tokens heads size"],
        Float[Array, "batch tokens kv_heads size"],
        Float[Array, "batch tokens kv_heads size"],
    ]:
        x = self.attention_norm(x)
        queries = rotate(self.query_norm(self.query(x)), rotation)
        keys = rotate(self.key_norm(self.key(x)), rotation)
        return constrain(queries, "batch", "tokens", "heads", None), keys, self.value(x)

    def finish(
        self,
        x: Float[Array, "batch tokens embed"],
        attended: Float[Array, "batch tokens heads size"],
        experts: Int[Array, "batch tokens chosen"] | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], Int[Array, "batch tokens chosen"] | None]:
        """The rest of the layer, once attention is done, and the experts of each token: those given, if any are."""
        x += self.out(attended)
        y = self.mlp_norm(x)
        y, experts = (self._mlp(y), None) if self.experts is None else self.experts(y, experts)
        return constrain(x + y, "batch", "tokens", None), experts

    def _mlp(self, y: Float[Array, "batch tokens embed"]) -> Float[Array, "batch tokens embed"]:
        hidden = ACTIVATION_FUNCTIONS[self.config.hidden_act](self.gate(y)) * self.up(y)
        return self.down(constrain(hidden, "batch", "tokens", "mlp"))


class Decoder(nnx.Module):
    """The layers and the norm after them."""

    def __init__(self, config: PolicyConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        text = config.text
        make = partial(_layer, text, precision)
        stacks = [stack(partial(make, run.moe), len(run.layers), rngs) for run in text.layer_runs]
        self.layers: TextLayer | LayerRuns | nnx.List[TextLayer] = stacks[0] if len(stacks) == 1 else LayerRuns(stacks)
        """Stacked, those of one kind; apart in a model that is `laid_out` for decoding."""
        self.norm = RMSNorm(text.hidden_size, epsilon=text.rms_norm_eps, precision=precision)

    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        rotation: Rotation,
        visibility: Visibility,
        deepstack: Float[Array, "depth batch tokens embed"] | None = None,
        experts: Int[Array, "batch tokens layers chosen"] | None = None,
        *,
        remat: Remat = "nothing",
        kernel: Kernel = "xla",
    ) -> Float[Array, "batch tokens embed"]:
        """All tokens of the rows at once; through these `experts`, if they are given."""

        def body(layer: TextLayer, x: Array, number: tuple[Array, Array | None]) -> Array:
            index, experts = number
            queries, keys, values = layer.queries_keys_values(x, rotation)
            attended = attention(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), visibility, kernel=kernel)
            x, _ = layer.finish(x, attended, experts)
            return _add_features(x, deepstack, index)

        by_layer = None if experts is None else jnp.moveaxis(experts, 2, 0)
        return self.norm(scan_runs(self.layers, body, x, (self._layer_indices(), by_layer), remat=remat))

    def extend(
        self,
        x: Float[Array, "batch tokens embed"],
        rotation: Rotation,
        cache: Cache,
        table: Int[Array, "batch width"],
        index: Int[Array, "batch tokens"],
        deepstack: Float[Array, "depth batch tokens embed"] | None = None,
        shared: SharedPages | None = None,
        *,
        kernel: Kernel = "xla",
    ) -> tuple[Float[Array, "batch tokens embed"], Cache, Int[Array, "batch tokens layers chosen"] | None]:
        """Tokens that continue what the cache holds, written at `index` of the rows whose pages `table` names.

        With them come the experts that they went through, if there are any. The whole cache is carried through the scan
        and written in place; scanned over layer by layer, it would be copied once a token.
        """

        def body(layer: TextLayer, carry: _Extended, number: Array) -> _Extended:
            x, cache, experts = carry
            queries, keys, values = layer.queries_keys_values(x, rotation)
            cache = cache.write(number, table, index, keys, values)
            attended = paged_attention(queries, cache, number, table, index, shared, kernel=kernel)
            x, chosen = layer.finish(x, attended)
            if experts is not None and chosen is not None:
                experts = experts.at[number].set(chosen.astype(experts.dtype))
            return _add_features(x, deepstack, number), cache, experts

        x, cache, experts = scan_runs(self.layers, body, (x, cache, self._no_experts(x)), self._layer_indices())
        return self.norm(x), cache, None if experts is None else jnp.moveaxis(experts, 0, 2)

    def _no_experts(self, x: Float[Array, "batch tokens embed"]) -> Int[Array, "layers batch tokens chosen"] | None:
        text = self.config.text
        if text.experts_a_token is None:
            return None
        layers, chosen = text.experts_a_token
        return jnp.zeros((layers, *x.shape[:2], chosen), text.expert_dtype)

    def _layer_indices(self) -> Int[Array, " layers"]:
        return jnp.arange(self.config.text.num_hidden_layers)


def _layer(config: TextConfig, precision: Precision, moe: MoEConfig | None, rngs: nnx.Rngs) -> TextLayer:
    return TextLayer(config, moe=moe, precision=precision, rngs=rngs)


def _add_features(
    x: Float[Array, "batch tokens embed"],
    deepstack: Float[Array, "depth batch tokens embed"] | None,
    layer: Int[Array, ""],
) -> Float[Array, "batch tokens embed"]:
    """Deepstack: the first layers each add the image features of another depth of the vision tower."""
    if deepstack is None:
        return x
    depth = deepstack.shape[0]
    features = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(layer, depth - 1), keepdims=False)
    return x + jnp.where(layer < depth, features, 0)
