"""The model as a decode step reads it best, which on a CPU is not as it is stored."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.policy import PolicyModel
from models.qwen3_vl.layers import LayerT, Linear, by_columns
from models.qwen3_vl.model import Qwen3VL
from models.qwen3_vl.runs import layers_apart
from sharding import RULES, constrain

FEW_ROWS = 32
"""Rows up to which decoding gains from it: a step of a 55M model, fp32, two cores of an AVX2 machine, took 0.58 of the
time with 8 rows, 0.74 with 16, 0.68 to 0.86 with 32, 0.96 to 1.03 with 64 and 1.16 with 128."""

GATHERED = replace(RULES, embed=None)
"""Where a gathered decoder's parameters are: split over tensor only."""


def decoding_layout(
    model: PolicyModel, *, platform: str, rows: int, gathered: bool = False
) -> tuple[nnx.GraphDef, Callable[[nnx.State], nnx.State]]:
    """The structure that decodes `rows` rows a device best, and what makes its parameters of the model's.

    `platform` is JAX's name of the devices. Only a CPU with few rows gets another structure than the model's: other
    compilers take parameters from where they lie, and accelerators may have no room for a copy of them. `gathered`
    makes that copy: what is split over fsdp and context is held whole, so that no step gathers it anew.
    """
    if gathered:
        return nnx.split(model)[0], jax.jit(partial(_gathered, dtype=model.dtype))
    if platform != "cpu" or rows > FEW_ROWS or not isinstance(model, Qwen3VL):
        return nnx.split(model)[0], lambda params: params
    graphdef, params = nnx.split(model)

    def of_params(params: nnx.State) -> Qwen3VL:
        return laid_out(nnx.merge(graphdef, params))

    @jax.jit
    def changed(params: nnx.State) -> nnx.State:
        return nnx.state(of_params(params), _is_changed)

    def lay_out(params: nnx.State) -> nnx.State:
        # What stays as it is does not pass through the program, which would return a copy of it.
        return nnx.merge_state(nnx.filter_state(params, nnx.Not(_is_changed)), changed(params))

    return nnx.split(nnx.eval_shape(of_params, params))[0], lay_out


def _gathered(params: nnx.State, *, dtype: DTypeLike) -> nnx.State:
    """The matrices that a decode step reads, in the dtype of its arithmetic, split over mesh.tensor only."""

    def gather(path: tuple, param: nnx.Variable) -> nnx.Variable:
        names = param.get_metadata().get("axes")
        if path[0] == "vision" or not names:
            return param
        values = param[...].astype(dtype)
        names = ("layers", *names) if values.ndim > len(names) else names
        return param.replace(constrain(values, *names, rules=GATHERED))

    return nnx.map_state(gather, params)


def laid_out(model: Qwen3VL) -> Qwen3VL:
    """The same model with a decoder and an output matrix that a CPU reads faster: a copy of them, in `model.dtype`.

    A scan copies each layer's parameters out of the stack before it uses them, once a token, and a product of a few
    rows takes longer where kernels stand inputs first. Here layers stand apart, and kernels outputs first.
    """
    layers = model.decoder.layers
    if isinstance(layers, nnx.List):
        raise ValueError("the model is laid out already; expected one as it is loaded")
    model = nnx.merge(*nnx.split(model))
    model.decoder.layers = nnx.List([_turned(layer) for layer in layers_apart(layers)])
    if model.output is not None:
        model.turned_head, model.output = _outputs_first(model.output, 1, model.dtype), None
    elif model.embedding[...].dtype == model.dtype:
        model.turned_head = model.embedding
    else:
        model.turned_head = _outputs_first(model.embedding, 0, model.dtype)
    return model


class TurnedLinear(nnx.Module):
    """A `Linear` whose kernel stands outputs first."""

    def __init__(self, linear: Linear):
        self.contracted = linear.contracted
        self.dtype = linear.dtype
        self.kernel = _outputs_first(linear.kernel, linear.contracted, linear.dtype)
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        split = x.ndim - self.contracted
        leading, inputs = x.shape[:split], math.prod(x.shape[split:])
        kernel = self.kernel[...]
        y = by_columns(x.astype(self.dtype).reshape(-1, inputs), kernel.reshape(-1, inputs))
        y = y.astype(self.dtype).reshape(*leading, *kernel.shape[: kernel.ndim - self.contracted])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _turned(layer: LayerT) -> LayerT:
    """The layer with every product's kernel outputs first; experts stay as they are."""
    for name, child in list(nnx.iter_children(layer)):
        if isinstance(child, Linear):
            setattr(layer, str(name), TurnedLinear(child))
    return layer


def _outputs_first(kernel: nnx.Param, contracted: int, dtype: DTypeLike) -> nnx.Param:
    """[*inputs, *outputs] -> [*outputs, *inputs], where the first `contracted` dimensions are inputs."""
    values, axes = kernel[...].astype(dtype), kernel.get_metadata()["axes"]
    order = (*range(contracted, values.ndim), *range(contracted))
    axes = tuple(axes[dimension] for dimension in order)
    return nnx.Param(constrain(values.transpose(order), *axes), axes=axes)


def _is_changed(path: tuple, _: object) -> bool:
    return path[0] in ("decoder", "output", "turned_head")
