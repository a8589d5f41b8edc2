"""What training carries from step to step, and the one way it changes."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree


class TrainState(NamedTuple):
    """Parameters, what the optimizer remembers of them, and how many steps were done."""

    params: Any
    """An `nnx.State`, or any pytree of arrays."""
    opt_state: Any
    step: Any
    """int32 []: calls of the step function: one rollout batch each in RL, one optimizer step each in SFT."""


def abstract_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result. `params` may be abstract itself.

    What the optimizer keeps for a parameter lies as the parameter does; everything else is on every device.
    """
    places = {(path, leaf.shape): leaf.sharding for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    everywhere = _replicated(next(iter(places.values())))

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        # An optimizer keeps trees like the parameters' inside its own: the end of a path names the parameter.
        ends = ((path[start:], leaf.shape) for start in range(len(path) + 1))
        sharding = next((places[end] for end in ends if end in places), everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = TrainState(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree_util.tree_map_with_path(place, state)


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0. `params` belong to the state from here on: the first step donates their buffers."""
    # Everything is committed to its devices, or the second step would see other shardings and compile again.
    shardings = state_shardings(abstract_state(params, optimizer))
    params = jax.device_put(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.int32(0), shardings.step))


def state_shardings(state: TrainState) -> TrainState:
    """Where each leaf of a state, abstract or not, lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def apply_gradients(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: optax.OptState, grads: PyTree
) -> tuple[PyTree, optax.OptState, Mapping[str, Float[Array, ""]]]:
    """One optimizer step, or none at all where a gradient is not finite: (params, opt_state, metrics)."""
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updates, next_opt_state = optimizer.update(grads, opt_state, params)
    stepped = optax.apply_updates(params, updates), next_opt_state
    params, opt_state = jax.tree.map(partial(jnp.where, finite), stepped, (params, opt_state))
    return params, opt_state, {"optimizer/grad_norm": grad_norm, "optimizer/skipped": 1.0 - finite}


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
