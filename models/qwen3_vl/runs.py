"""Layers that are not all alike: a stack for each run of equal ones."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from models.qwen3_vl.layers import Carry, LayerT, Remat, scan


class LayerRuns(nnx.Module):
    """Stacks of layers, to be gone through one after another."""

    def __init__(self, stacks: list[Any]):
        self.stacks = nnx.List(stacks)


def layers_apart(layers: LayerT | LayerRuns) -> list[LayerT]:
    """The layers of a stack, or of all stacks, one by one."""
    found = []
    for stack in _stacks(layers):
        graphdef, params = nnx.split(stack)
        for number in range(_height(stack)):
            found.append(nnx.merge(graphdef, jax.tree.map(lambda stacked, at=number: stacked[at], params)))
    return found


def scan_runs(
    layers: nnx.Module | nnx.List,
    body: Callable[[Any, Carry, Any], Carry],
    carry: Carry,
    xs: Any,
    *,
    remat: Remat = "nothing",
) -> Carry:
    """`scan` through one stack after another; `xs` runs through all of them."""
    if not isinstance(layers, LayerRuns):
        return scan(layers, body, carry, xs, remat=remat)
    begin = 0
    for stack in _stacks(layers):
        end = begin + _height(stack)
        carry = scan(stack, body, carry, jax.tree.map(lambda x, a=begin, b=end: x[a:b], xs), remat=remat)
        begin = end
    return carry


def _stacks(layers: nnx.Module) -> list[nnx.Module]:
    return list(layers.stacks) if isinstance(layers, LayerRuns) else [layers]


def _height(stack: nnx.Module) -> int:
    return len(jax.tree.leaves(nnx.state(stack))[0])
