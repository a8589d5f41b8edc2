"""The optimizer of a run, from its settings."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree
from optax.contrib import MuonDimensionNumbers

from hdpo_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, total_steps: int, params: PyTree) -> optax.GradientTransformation:
    """Clipping to a global norm, then AdamW or Muon. Of `params`, abstract or not, only shapes and axis names are read.

    `total_steps` counts optimizer steps (a rollout step takes one a mini-batch). The arithmetic is fp32 whatever the
    parameters are; the moments are kept in `config.moments`, rounded to the nearest. Weight decay is decoupled and
    falls on every parameter, as in the paper's run.
    """
    adam_rate = learning_rate_schedule(config, config.learning_rate, total_steps)
    if config.name == "adamw":
        rule = optax.adamw(adam_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    else:
        # Muon (Jordan et al., 2024), each layer's matrices on their own; Adam for embeddings, norms, biases, the head.
        rule = optax.contrib.muon(
            learning_rate_schedule(config, config.muon_learning_rate, total_steps),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=adam_rate,
            muon_weight_dimension_numbers=_matrices(params),
        )
    return _in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), rule), jnp.dtype(config.moments))


def learning_rate_schedule(config: OptimizerConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Linear rise to `peak` over the warm-up (the first step already moves), then constant, or a cosine down to 0."""

    def learning_rate(count: ArrayLike) -> Array:
        step = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "constant":
            return peak * rise
        done = jnp.clip((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        return peak * rise * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return learning_rate


def _matrices(params: PyTree) -> PyTree:
    """The tree of `params` with, for every matrix of the network, the axes it maps from and to; None elsewhere."""

    def visit(leaf: Any) -> Any:
        axes = (leaf.get_metadata().get("axes") or ()) if isinstance(leaf, nnx.Variable) else ()
        return jax.tree.map(lambda array: _matrix_axes(axes, array.ndim), leaf)

    return jax.tree.map(visit, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _matrix_axes(axes: tuple[str | None, ...], dimensions: int) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are the two sides of its matrices; None for biases, scales and look-up tables.

    A kernel's names begin or end with the residual stream: ("embed", "heads", "head_dim"), stacked over layers, maps
    axis 1 to axes 2 and 3. Unnamed axes (the 3 of a joint query, key and value) number matrices, as the layer axis
    does and, where it comes first, that of experts. Mergers and the patch embedding are matrices without layers.
    """
    axes = axes[1:] if axes[:1] == ("experts",) else axes
    stacked = dimensions - len(axes)
    if len(axes) < 2 or "vocab" in axes:
        return None
    named = tuple(place for place, name in enumerate(axes, start=stacked) if name is not None)
    if str(axes[0]).endswith("embed"):
        return MuonDimensionNumbers(reduction_axis=named[:1], output_axis=named[1:])
    if axes[0] is not None and str(axes[-1]).endswith("embed"):
        return MuonDimensionNumbers(reduction_axis=named[:-1], output_axis=named[-1:])
    return None


def _in_float32(inner: optax.GradientTransformation, moments: jnp.dtype) -> optax.GradientTransformation:
    """`inner` with fp32 arithmetic for parameters of any dtype, and its moments kept in a dtype of their own."""

    def to_float32(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: PyTree) -> optax.OptState:
        return _with_moments(inner.init(to_float32(params)), moments)

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        state = _with_moments(state, jnp.dtype(jnp.float32))
        updates, state = inner.update(to_float32(updates), state, to_float32(params))
        return updates, _with_moments(state, moments)

    return optax.GradientTransformation(init, update)


def _with_moments(state: optax.OptState, dtype: jnp.dtype) -> optax.OptState:
    """`state` with its moments in `dtype`: what stands in the fields `mu` and `nu` of optax's states."""
    fields = {jax.tree_util.GetAttrKey("mu"), jax.tree_util.GetAttrKey("nu")}

    def cast(path: tuple, leaf: Array) -> Array:
        return leaf if fields.isdisjoint(path) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, state)
