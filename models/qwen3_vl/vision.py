"""The vision tower: packed patches of many images -> features for the decoder, one set for each depth it takes them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.qwen3_vl.attention import Kernel, attention
from models.qwen3_vl.config import VisionConfig
from models.qwen3_vl.images import PackedImages
from models.qwen3_vl.layers import ACTIVATION_FUNCTIONS, LayerNorm, Linear, Precision, Remat, scan, stack
from models.qwen3_vl.rope import Rotation, rotate, vision_rotation
from models.qwen3_vl.visibility import Visibility
from sharding import constrain


class VisionLayer(nnx.Module):
    """Pre-norm transformer block; patches attend within their segment."""

    def __init__(self, config: VisionConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        width, heads, size = config.hidden_size, config.num_heads, config.head_dim
        common = {"bias": True, "std": config.initializer_range, "precision": precision, "rngs": rngs}
        attention_axes = ("vision_embed", None, "vision_heads", "head_dim")
        self.attention_norm = LayerNorm(width, precision=precision)
        self.qkv = Linear((width,), (3, heads, size), axes=attention_axes, **common)
        self.out = Linear((heads, size), (width,), axes=("vision_heads", "head_dim", "vision_embed"), **common)
        self.mlp_norm = LayerNorm(width, precision=precision)
        self.up = Linear((width,), (config.intermediate_size,), axes=("vision_embed", "vision_mlp"), **common)
        self.down = Linear((config.intermediate_size,), (width,), axes=("vision_mlp", "vision_embed"), **common)

    def __call__(
        self, x: Float[Array, "rows patches width"], rotation: Rotation, visibility: Visibility, kernel: Kernel
    ) -> Float[Array, "rows patches width"]:
        queries, keys, values = jnp.moveaxis(self.qkv(self.attention_norm(x)), 2, 0)
        queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        x += self.out(attention(queries, keys, values, visibility, kernel=kernel, heads_axis="vision_heads"))
        activation = ACTIVATION_FUNCTIONS[self.config.hidden_act]
        x += self.down(activation(self.up(self.mlp_norm(x))))
        return constrain(x, "batch", "tokens", None)


class PatchMerger(nnx.Module):
    """A block of neighbouring patches -> one feature of the decoder's width."""

    def __init__(self, config: VisionConfig, *, norm_after_merge: bool, precision: Precision, rngs: nnx.Rngs):
        self.merged_size = config.merged_size
        self.norm_after_merge = norm_after_merge
        common = {"bias": True, "std": config.initializer_range, "precision": precision, "rngs": rngs}
        # The main merger norms each patch, those of deepstack the joined block: different sizes of the same name.
        self.norm = LayerNorm(config.merged_size if norm_after_merge else config.hidden_size, precision=precision)
        self.up = Linear((config.merged_size,), (config.merged_size,), axes=("vision_embed", "merged"), **common)
        self.down = Linear((config.merged_size,), (config.out_hidden_size,), axes=("merged", "embed"), **common)

    def __call__(self, x: Float[Array, "rows patches width"]) -> Float[Array, "rows features embed"]:
        merged = (x.shape[0], -1, self.merged_size)
        x = self.norm(x.reshape(merged)) if self.norm_after_merge else self.norm(x).reshape(merged)
        # The exact GELU, whatever activation the config names for the layers.
        return self.down(ACTIVATION_FUNCTIONS["gelu"](self.up(x)))


class VisionTower(nnx.Module):
    """Patch embedding, learned and rotary positions, layers, and a merger at each tapped depth."""

    def __init__(self, config: VisionConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = config
        self.dtype = precision.compute
        self.patch_embedding = Linear(
            (config.patch_dim,),
            (config.hidden_size,),
            axes=("patch", "vision_embed"),
            bias=True,
            std=config.initializer_range,
            precision=precision,
            rngs=rngs,
        )
        table = jax.random.normal(rngs.params(), (config.num_position_embeddings, config.hidden_size), precision.params)
        self.position_table = nnx.Param(config.initializer_range * table, axes=(None, "vision_embed"))
        self.layers = stack(lambda rngs: VisionLayer(config, precision=precision, rngs=rngs), config.depth, rngs)
        self.merger = PatchMerger(config, norm_after_merge=False, precision=precision, rngs=rngs)
        self.deepstack_mergers = nnx.List(
            PatchMerger(config, norm_after_merge=True, precision=precision, rngs=rngs)
            for _ in config.deepstack_visual_indexes
        )

    def __call__(
        self, images: PackedImages, *, remat: Remat = "nothing", kernel: Kernel = "xla"
    ) -> tuple[Float[Array, "rows features embed"], list[Float[Array, "rows features embed"]]]:
        """Features that replace token embeddings, and those that deepstack adds after the first decoder layers."""
        table = self.position_table[...].astype(jnp.float32)
        # Corner by corner: gathering the four at once would hold four times the hidden states.
        positions = sum(table[images.corners[..., k]] * images.weights[..., k, None] for k in range(4))
        x = self.patch_embedding(images.patches) + jnp.asarray(positions, self.dtype)
        x = constrain(x, "batch", "tokens", None)
        rotation = vision_rotation(self.config, images.coordinates)
        visibility = Visibility(query_ids=images.segment_ids, key_ids=images.segment_ids)

        def body(layer: VisionLayer, x: Array, _: None) -> Array:
            return layer(x, rotation, visibility, kernel)

        deepstack, begin = [], 0
        for tap, merger in self.config.deepstack_taps:
            x = scan(self.layers, body, x, span=slice(begin, tap + 1), remat=remat)
            deepstack.append(self.deepstack_mergers[merger](x))
            begin = tap + 1
        if begin < self.config.depth:
            x = scan(self.layers, body, x, span=slice(begin, self.config.depth), remat=remat)
        return self.merger(x), deepstack
