"""Pieces that the decoder and the vision tower are made of, and the scan over stacked layers."""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Remat = Literal["nothing", "full", "save_attention", "offload"]
"""What the backward pass computes anew. nothing: all that it needs is kept. full: all but what passes from layer to
layer. save_attention: the same, but what attention gives is kept, too (to no avail on a GPU, whose kernel needs more
than that). offload: as full, and what is kept waits in host memory."""
ATTENTION, LAYER_INPUT = "attention", "layer_input"
"""Names (`checkpoint_name`) by which arrays are kept."""
LayerT = TypeVar("LayerT", bound=nnx.Module)
Carry = TypeVar("Carry")

ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Precision(NamedTuple):
    """Dtype of the arithmetic, and of the parameters as they are stored."""

    compute: DTypeLike
    params: DTypeLike


class Linear(nnx.Module):
    """x W + b over the last dimensions of x; `inputs` and `outputs` may be several dimensions each."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        bias: bool,
        std: float,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shape = (*inputs, *outputs)
        if len(axes) != len(shape):
            raise ValueError(f"axes {axes} do not name the dimensions of a kernel of shape {shape}")
        self.contracted = len(inputs)
        self.dtype = precision.compute
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, precision.params), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs, precision.params), axes=axes[len(inputs) :]) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        leading = x.shape[: x.ndim - self.contracted]
        # One leading dimension: on a CPU the gradients of a product with two take 1.6 times as long.
        flat = x.astype(self.dtype).reshape(-1, *x.shape[x.ndim - self.contracted :])
        y = jnp.tensordot(flat, self.kernel[...].astype(self.dtype), self.contracted)
        y = y.reshape(*leading, *y.shape[1:])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def by_columns(
    rows: Float[Array, "rows inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """rows kernel^T as (kernel rows^T)^T, in fp32: what a CPU does fastest with few rows, for it packs no kernel."""
    # Without the barriers XLA makes of it the product that it stands for.
    columns = jax.lax.optimization_barrier(rows.T)
    return jax.lax.optimization_barrier(jnp.matmul(kernel, columns, preferred_element_type=jnp.float32)).T


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dimension; the mean is taken in fp32."""

    def __init__(self, size: int, *, epsilon: float, precision: Precision):
        self.epsilon = epsilon
        self.dtype = precision.compute
        self.scale = nnx.Param(jnp.ones((size,), precision.params))

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return x32.astype(self.dtype) * self.scale[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias over the last dimension, in fp32."""

    def __init__(self, size: int, *, precision: Precision):
        self.dtype = precision.compute
        self.scale = nnx.Param(jnp.ones((size,), precision.params))
        self.bias = nnx.Param(jnp.zeros((size,), precision.params))

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        # 1e-6 is written into the architecture, not into its config.
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


def stack(make: Callable[[nnx.Rngs], LayerT], count: int, rngs: nnx.Rngs) -> LayerT:
    """`count` independently initialised modules as one, every parameter with a leading axis of that length."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def scan(
    layers: nnx.Module | nnx.List,
    body: Callable[[Any, Carry, Any], Carry],
    carry: Carry,
    xs: Any = None,
    *,
    span: slice = slice(None),
    remat: Remat = "nothing",
) -> Carry:
    """carry = body(layer, carry, x) through a stack of layers (those in `span`) and the leading axis of `xs`.

    Layers that stand apart, in a list, are written out one after another; that is for inference, and `remat` is moot.
    `remat` says what of the layers' inside is kept for the backward pass.
    """
    if isinstance(layers, nnx.List):
        for number, layer in enumerate(list(layers)[span]):
            carry = body(layer, carry, jax.tree.map(itemgetter(number), xs))
        return carry
    graphdef, params = nnx.split(layers)
    if span != slice(None):
        params = jax.tree.map(lambda stacked: stacked[span], params)

    def step(carry: Carry, inputs: tuple[Any, Any]) -> tuple[Carry, None]:
        layer_params, x = inputs
        if remat == "offload":
            carry = jax.tree.map(lambda array: checkpoint_name(array, LAYER_INPUT), carry)
        return body(nnx.merge(graphdef, layer_params), carry, x), None

    if remat != "nothing":
        step = jax.checkpoint(step, prevent_cse=False, policy=_kept(remat))
    return jax.lax.scan(step, carry, (params, xs))[0]


def _kept(remat: Remat) -> Callable[..., Any]:
    """The policy of `jax.checkpoint`, which keeps a layer's inputs whatever it says, unless it sends them elsewhere."""
    policies = jax.checkpoint_policies
    match remat:
        case "save_attention":
            return policies.save_only_these_names(ATTENTION)
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
        case _:
            return policies.nothing_saveable
