"""The model as a decode step reads it best, which on a CPU is not as it is stored."""

import math
from operator import itemgetter

import jax
from flax import nnx
from jaxtyping import Array, Float

from models.qwen3_vl.layers import LayerT, Linear, by_columns
from models.qwen3_vl.model import Qwen3VL
from sharding import constrain


def for_decoding(model: Qwen3VL, platform: str) -> Qwen3VL:
    """The same model, for programs that compute a token a row many times over; `platform` is JAX's name of it.

    On a CPU a scan copies each layer's parameters out of the stack before it uses them, once a token, and a product of
    a few rows takes longer where kernels stand inputs first. So there the decoder's layers stand apart, and kernels and
    output matrix outputs first: a copy of them all. Accelerators read a layer where it lies: the model as it is.
    """
    layers = model.decoder.layers
    if platform != "cpu" or isinstance(layers, nnx.List):
        return model
    model = nnx.merge(*nnx.split(model))
    model.decoder.layers = nnx.List([_turned(layer) for layer in _apart(layers)])
    model.turned_head = model.embedding if model.output is None else _outputs_first(model.output, contracted=1)
    model.output = None
    return model


class TurnedLinear(nnx.Module):
    """A `Linear` whose kernel stands outputs first."""

    def __init__(self, linear: Linear):
        self.contracted = linear.contracted
        self.dtype = linear.dtype
        self.kernel = _outputs_first(linear.kernel, linear.contracted)
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        split = x.ndim - self.contracted
        leading, inputs = x.shape[:split], math.prod(x.shape[split:])
        kernel = self.kernel[...].astype(self.dtype)
        y = by_columns(x.astype(self.dtype).reshape(-1, inputs), kernel.reshape(-1, inputs))
        y = y.astype(self.dtype).reshape(*leading, *kernel.shape[: kernel.ndim - self.contracted])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _apart(layers: LayerT) -> list[LayerT]:
    """Stacked layers, one by one."""
    graphdef, params = nnx.split(layers)
    count = len(jax.tree.leaves(params)[0])
    return [nnx.merge(graphdef, jax.tree.map(itemgetter(number), params)) for number in range(count)]


def _turned(layer: LayerT) -> LayerT:
    """The layer with every product's kernel outputs first."""
    for name, child in list(nnx.iter_children(layer)):
        if isinstance(child, Linear):
            setattr(layer, str(name), TurnedLinear(child))
    return layer


def _outputs_first(kernel: nnx.Param, contracted: int) -> nnx.Param:
    values, axes = kernel[...], kernel.get_metadata()["axes"]
    order = (*range(contracted, values.ndim), *range(contracted))
    axes = tuple(axes[dimension] for dimension in order)
    return nnx.Param(constrain(values.transpose(order), *axes), axes=axes)
