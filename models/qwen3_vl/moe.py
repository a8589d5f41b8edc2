"""Mixture of experts: each token goes through the few MLPs that a router chooses for it, and none is dropped.

The (token, expert) pairs are sorted by expert, so that the experts are one grouped matrix product. On a mesh the
experts are spread over devices, and either they or the tokens travel, whichever are smaller.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from models.qwen3_vl.config import MoEConfig, TextConfig
from models.qwen3_vl.grouped import grouped_matmul
from models.qwen3_vl.layers import ACTIVATION_FUNCTIONS, Precision
from sharding import RULES, constrain, spec

GATE_UP_AXES = ("experts", "embed", None, "mlp")
DOWN_AXES = ("experts", "mlp", "embed")
TOKEN_AXES = ("batch", "tokens", None)


class SparseMLP(nnx.Module):
    """Router and experts; in the place of a layer's MLP. As transformers' `Qwen3VLMoeTextSparseMoeBlock`."""

    def __init__(self, config: TextConfig, moe: MoEConfig, *, precision: Precision, rngs: nnx.Rngs):
        self.config = moe
        self.activation = config.hidden_act
        self.dtype = precision.compute
        width, hidden, experts = config.hidden_size, moe.moe_intermediate_size, moe.num_experts

        def param(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            values = jax.random.normal(rngs.params(), shape, precision.params)
            return nnx.Param(config.initializer_range * values, axes=axes)

        self.router = param((width, experts), ("embed", "experts"))
        self.gate_up = param((experts, width, 2, hidden), GATE_UP_AXES)
        self.down = param((experts, hidden, width), DOWN_AXES)

    def __call__(
        self, x: Float[Array, "batch tokens embed"], choice: Int[Array, "batch tokens chosen"] | None = None
    ) -> tuple[Float[Array, "batch tokens embed"], Int[Array, "batch tokens chosen"]]:
        """What the experts make of each token, and which they are; a `choice` that is given is taken."""
        choice, share = self.route(x, choice)
        # Cast before they travel: half the bytes.
        gate_up, down = self.gate_up[...].astype(self.dtype), self.down[...].astype(self.dtype)
        apply = partial(_apply_experts, ACTIVATION_FUNCTIONS[self.activation])
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Auto not in mesh.axis_types:
            return apply(x, choice, share, gate_up, down), choice
        return _on_mesh(apply, mesh, x, choice, share, gate_up, down), choice

    def route(
        self, x: Float[Array, "batch tokens embed"], choice: Int[Array, "batch tokens chosen"] | None = None
    ) -> tuple[Int[Array, "batch tokens chosen"], Float[Array, "batch tokens chosen"]]:
        """The experts of each token, and what each of them counts for; fp32, 1 in sum.

        A `choice` is kept, whatever the router would choose by now; its shares are the router's, and so is the gradient
        (Ma et al., arXiv:2510.11370).
        """
        # The logits stay fp32: rounded, experts would tie, and the sampler and the learner choose differently.
        logits = jnp.matmul(x, self.router[...].astype(x.dtype), preferred_element_type=jnp.float32)
        logits = constrain(logits, *TOKEN_AXES)
        if choice is not None:
            choice = choice.astype(jnp.int32)
            # The same as below, and sound where all of these have become unlikely.
            return choice, jax.nn.softmax(jnp.take_along_axis(logits, choice, axis=-1))
        chosen, choice = jax.lax.top_k(jax.nn.softmax(logits), self.config.num_experts_per_tok)
        return choice, chosen / chosen.sum(axis=-1, keepdims=True)


# -- on one device ------------------------------------------------------------------------------------------------


class _Sorting(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert; those of experts elsewhere have no place."""

    token: Int[Array, " rows"]
    """The token of each sorted pair."""
    pair: Int[Array, " rows"]
    """Where it stood before: token by token."""
    place: Int[Array, "all chosen"]
    """Where each pair stands now; past the last row: elsewhere."""
    sizes: Int[Array, " experts"]
    """Pairs of each expert here."""


def _apply_experts(
    activation: Callable[[Array], Array],
    x: Float[Array, "batch tokens embed"],
    choice: Int[Array, "batch tokens chosen"],
    share: Float[Array, "batch tokens chosen"],
    gate_up: Float[Array, "experts embed 2 hidden"],
    down: Float[Array, "experts hidden embed"],
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "batch tokens embed"]:
    """The sum over each token's experts of share * down(activation(gate(x)) * up(x)).

    Over those that are here, that is: the experts from `first` on.
    """
    experts, width = gate_up.shape[:2]
    flat = x.reshape(-1, width)
    sorting = _sort(choice.reshape(len(flat), -1) - first, experts)
    rows = _dispatch(flat, sorting)
    gate, up = jnp.split(grouped_matmul(rows, gate_up.reshape(experts, width, -1), sorting.sizes), 2, axis=-1)
    # The share weighs what goes in and not what comes out of `down`, which is wider.
    hidden = activation(gate) * up * share.reshape(-1)[sorting.pair, None].astype(x.dtype)
    return _combine(grouped_matmul(hidden, down, sorting.sizes), sorting).reshape(x.shape)


def _sort(choice: Int[Array, "all chosen"], experts: int) -> _Sorting:
    """`choice` counts from the first expert here; a token has at most one pair with each of them."""
    tokens, chosen = choice.shape
    rows = tokens * min(chosen, experts)
    here = (choice >= 0) & (choice < experts)
    expert = jnp.where(here, choice, experts).reshape(-1)
    order = jnp.argsort(expert)
    place = jnp.where(here, jnp.argsort(order).reshape(choice.shape), rows)
    sizes = jnp.sum(expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    pair = order[:rows]
    return _Sorting(token=pair // chosen, pair=pair, place=place, sizes=sizes)


# Gathers both, forward and backward: what JAX would derive is a scatter that adds, which accelerators do slowly.


@jax.custom_vjp
def _dispatch(tokens: Float[Array, "all embed"], sorting: _Sorting) -> Float[Array, "rows embed"]:
    """The token of every pair."""
    return tokens[sorting.token]


@jax.custom_vjp
def _combine(rows: Float[Array, "rows embed"], sorting: _Sorting) -> Float[Array, "all embed"]:
    """The sum of every token's pairs."""
    return rows.at[sorting.place].get(mode="fill", fill_value=0).sum(axis=1)


_dispatch.defvjp(lambda x, sorting: (_dispatch(x, sorting), sorting), lambda sorting, y: (_combine(y, sorting), None))
_combine.defvjp(lambda x, sorting: (_combine(x, sorting), sorting), lambda sorting, y: (_dispatch(y, sorting), None))


# -- on a mesh ----------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Mesh axes by which the tokens and each dimension of the experts are split."""

    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    embed: tuple[str, ...]
    hidden: tuple[str, ...]

    @classmethod
    def on(cls, mesh: AbstractMesh, x: Array, gate_up: Array) -> "_Layout":
        of_tokens = spec(RULES, TOKEN_AXES, mesh, x.shape)
        of_experts = spec(RULES, GATE_UP_AXES, mesh, gate_up.shape)
        experts, embed, _, hidden = (_mesh_axes(of_experts, dimension) for dimension in range(4))
        tokens = tuple(axis for dimension in range(len(of_tokens)) for axis in _mesh_axes(of_tokens, dimension))
        return cls(tokens=tokens, experts=experts, embed=embed, hidden=hidden)

    def of_parameters(self, *, whole: bool) -> tuple[P, P]:
        """Specs of `gate_up` and `down`; `whole`: with all experts on a device that holds tokens of its own.

        What would be gathered for the same tokens on several devices is gathered before, by the compiler.
        """
        experts = _among(self.experts, self.tokens) if whole else self.experts
        embed = _among(self.embed, self.tokens)
        return P(experts, embed, None, self.hidden), P(experts, self.hidden, embed)


def _on_mesh(
    apply: Callable[..., Array],
    mesh: AbstractMesh,
    x: Float[Array, "batch tokens embed"],
    choice: Int[Array, "batch tokens chosen"],
    share: Float[Array, "batch tokens chosen"],
    gate_up: Float[Array, "experts embed 2 hidden"],
    down: Float[Array, "experts hidden embed"],
) -> Float[Array, "batch tokens embed"]:
    """`apply` where tokens and experts lie; sorting and grouping are each device's own affair.

    Hidden units stay split, and their parts are summed up. The experts of this layer, and of no other, are gathered for
    the tokens of each device. Or the tokens are gathered for the experts of each device: if that is less, as in a
    decode step, or if these devices hold the same tokens anyhow.
    """
    layout = _Layout.on(mesh, x, gate_up)
    moving, standing = _among(layout.experts, layout.tokens), _without(layout.experts, layout.tokens)
    tokens = x.size // _devices(mesh, _without(layout.tokens, layout.experts))
    parameters = (gate_up.size + down.size) // _devices(mesh, layout.hidden)
    # Tokens go there and come back.
    experts_stay = bool(standing) or (bool(moving) and 2 * tokens < parameters)

    def with_whole_experts(x: Array, choice: Array, share: Array, gate_up: Array, down: Array) -> Array:
        gate_up, down = _gathered(gate_up, moving, 0), _gathered(down, moving, 0)
        return jax.lax.psum(apply(x, choice, share, gate_up, down), layout.hidden)

    def with_all_tokens(x: Array, choice: Array, share: Array, gate_up: Array, down: Array) -> Array:
        first = jax.lax.axis_index(layout.experts) * len(gate_up)
        x, choice, share = (_gathered(part, moving, 0) for part in (x, choice, share))
        y = apply(x, choice, share, gate_up, down, first)
        y = jax.lax.psum(y, (*standing, *layout.hidden))
        return jax.lax.psum_scatter(y, moving, tiled=True) if moving else y

    def body(x: Array, choice: Array, share: Array, gate_up: Array, down: Array) -> Array:
        inside = _among(layout.embed, layout.tokens)
        gate_up, down = _gathered(gate_up, inside, 1), _gathered(down, inside, 2)
        return (with_all_tokens if experts_stay else with_whole_experts)(x, choice, share, gate_up, down)

    of_tokens = spec(RULES, TOKEN_AXES, mesh, x.shape)
    of_parameters = layout.of_parameters(whole=not experts_stay)
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    mapped = jax.shard_map(
        body,
        in_specs=(of_tokens, of_tokens, of_tokens, *of_parameters),
        out_specs=of_tokens,
        axis_names=automatic,
        check_vma=False,  # a kernel does not say on which axes its result varies
    )
    return mapped(x, choice, share, gate_up, down)


def _mesh_axes(layout: P, dimension: int) -> tuple[str, ...]:
    found = layout[dimension] if dimension < len(layout) else None
    return () if found is None else (found,) if isinstance(found, str) else tuple(found)


def _among(axes: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in others)


def _without(axes: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in others)


def _devices(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _gathered(array: Array, axes: tuple[str, ...], dimension: int) -> Array:
    return jax.lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array
