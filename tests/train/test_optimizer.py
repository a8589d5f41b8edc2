from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hdpo_jax.algorithm.state import abstract_state, init_state, state_shardings
from hdpo_jax.config import OptimizerConfig
from hdpo_jax.train.optimizer import learning_rate_schedule, make_optimizer
from sharding import make_mesh, param_shardings


class Stack(nnx.Module):
    """Parameters named and shaped as the model's: two stacked layers, an embedding outside."""

    def __init__(self, dtype=jnp.float32):
        def normal(seed: int, *shape: int) -> jax.Array:
            return jax.random.normal(jax.random.key(seed), shape).astype(dtype)

        self.embedding = nnx.Param(normal(0, 16, 8), axes=("vocab", "embed"))
        self.up = nnx.Param(normal(1, 2, 8, 12), axes=("embed", "mlp"))
        self.out = nnx.Param(normal(3, 2, 2, 4, 8), axes=("heads", "head_dim", "embed"))
        self.qkv = nnx.Param(normal(4, 2, 8, 3, 2, 4), axes=("vision_embed", None, "vision_heads", "head_dim"))
        self.qkv_bias = nnx.Param(normal(5, 2, 3, 2, 4), axes=(None, "vision_heads", "head_dim"))
        self.experts_gate_up = nnx.Param(normal(8, 2, 3, 8, 2, 12), axes=("experts", "embed", None, "mlp"))
        self.experts_down = nnx.Param(normal(9, 2, 3, 12, 8), axes=("experts", "mlp", "embed"))
        self.router = nnx.Param(normal(10, 2, 8, 3), axes=("embed", "experts"))
        self.bias = nnx.Param(normal(6, 2, 12), axes=("mlp",))
        self.scale = nnx.Param(normal(7, 2, 8))


MATRICES = {"up": (8, 12), "out": (8, 8), "qkv": (8, 8), "router": (8, 3)}
MATRICES |= {"experts_gate_up": (8, 12), "experts_down": (12, 8)}
UNNAMED = {"qkv": 2, "experts_gate_up": 3}


def params_of(dtype=jnp.float32) -> Any:
    return nnx.split(Stack(dtype))[1]


def grads_of(params: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def step(optimizer: optax.GradientTransformation, params: Any, grads: Any) -> dict[str, np.ndarray]:
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return {str(path[0]): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(updates)}


def rates(config: OptimizerConfig, peak: float, counts: list[int]) -> np.ndarray:
    schedule = learning_rate_schedule(config, peak, total_steps=10)
    return np.array([schedule(count) for count in counts])


def test_schedules():
    # The first step moves by a quarter: optax's own warm-up would start at 0 and waste it.
    warm = rates(OptimizerConfig(warmup_steps=4), 2.0, [0, 1, 3, 4, 9, 50])
    np.testing.assert_allclose(warm, [0.5, 1.0, 2.0, 2.0, 2.0, 2.0])
    cosine = rates(OptimizerConfig(schedule="cosine", warmup_steps=2), 1.0, [0, 1, 2, 6, 10, 11])
    np.testing.assert_allclose(cosine, [0.5, 1, 1, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(rates(OptimizerConfig(), 1e-6, [0, 9]), [1e-6, 1e-6])


def assert_updates(updates: Any, expected: list[float]) -> None:
    np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def test_adamw_by_hand():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=1.0, b1=0.9, b2=0.999)
    params = {"w": jnp.array([2.0, -4.0])}
    optimizer = make_optimizer(config, 10, params)
    state: Any = optimizer.init(params)
    # Norm 5 clipped to 1: 0.6, 0.8. First Adam step +-1; decay 0.5 * w on top: -0.1 * (1 + 1), -0.1 * (1 - 2).
    first, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, state, params)
    assert_updates(first, [-0.2, 0.1])
    # Second gradient, small: m = 0.9 * 0.06 + 0.1 * 0.3 = 0.084, v = 0.001 * (0.36 * 0.999 + 0.09). Unclipped first
    # moments (0.3) would give 0.9 m.
    second, _ = optimizer.update({"w": jnp.array([0.3, 0.4])}, state, params)
    moment, variance = 0.084 / (1 - 0.9**2), 0.001 * (0.36 * 0.999 + 0.09) / (1 - 0.999**2)
    adam = moment / np.sqrt(variance)
    assert_updates(second, [-0.1 * (adam + 1.0), -0.1 * (adam - 2.0)])


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps with Muon's coefficients (Jordan et al., 2024), of one matrix alone."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_steps_each_layers_matrices_on_their_own():
    config = OptimizerConfig(name="muon", learning_rate=1e-3, muon_learning_rate=0.5, weight_decay=0.0)
    params = params_of()
    grads = grads_of(params)
    found = step(make_optimizer(config, 10, params), params, grads)
    for name, (rows, columns) in MATRICES.items():
        update, gradient = found[name], np.asarray(grads[name][...])
        if name in UNNAMED:  # three matrices a layer, not one of width 24; two of each expert
            update, gradient = (np.moveaxis(values, UNNAMED[name], 1) for values in (update, gradient))
        update, gradient = update.reshape(-1, rows, columns), gradient.reshape(-1, rows, columns)
        for matrix, layer in zip(update, gradient, strict=True):
            expected = -0.5 * np.sqrt(max(1.0, columns / rows)) * orthogonalised(layer)
            np.testing.assert_allclose(matrix, expected, atol=1e-3, err_msg=name)
    for name in ("embedding", "qkv_bias", "bias", "scale"):
        assert 5e-4 < np.abs(found[name]).max() < 5e-3, name  # Adam's step, of its own learning rate


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_has_its_dtype_and_lies_as_its_parameters(name, moments):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    params = params_of(jnp.bfloat16)
    params = jax.device_put(params, param_shardings(params, mesh))
    optimizer = make_optimizer(OptimizerConfig(name=name, moments=moments, b2=0.99), 10, params)
    state = init_state(params, optimizer)
    assert state_shardings(state) == state_shardings(abstract_state(params, optimizer))
    places = {str(path[0]): variable[...].sharding for path, variable in nnx.to_flat_state(state.params)}
    kept: list[str] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        named = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in places]
        if named:
            assert leaf.dtype == moments, path
            assert leaf.sharding == places[named[0]], path
            kept += named
        else:  # counts, and the coefficients of Muon's polynomial, which bfloat16 would change
            assert leaf.dtype in (jnp.float32, jnp.int32) and leaf.sharding.is_fully_replicated, path
    twice = set(places) if name == "adamw" else set(places) - set(MATRICES)
    assert sorted(kept) == sorted([*places, *twice])
    assert not places["up"].is_fully_replicated

    grads = grads_of(state.params)
    updates, opt_state = jax.jit(optimizer.update)(grads, state.opt_state, state.params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
    moved = optax.apply_updates(state.params, updates)
    assert jax.tree.map(lambda leaf: leaf.dtype, opt_state) == jax.tree.map(lambda leaf: leaf.dtype, state.opt_state)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(moved))


def test_moments_in_bfloat16_by_hand():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, b1=0.9, b2=0.99, moments="bfloat16")
    params = {"w": jnp.array([1.0])}
    optimizer = make_optimizer(config, 10, params)
    state: Any = optimizer.init(params)
    first, state = optimizer.update({"w": jnp.array([0.3])}, state, params)
    assert_updates(first, [-0.1])  # from moments not yet rounded
    second: Any
    second, state = optimizer.update({"w": jnp.array([-0.5])}, state, params)
    # 0.03 and 0.0009 were kept as 0.030029296875 and 0.0009002685546875: 0.02929. Unrounded they would give 0.02932.
    moment, variance = 0.9 * 0.030029296875 - 0.05, 0.99 * 0.0009002685546875 + 0.01 * 0.25
    expected = -0.1 * (moment / (1 - 0.9**2)) / np.sqrt(variance / (1 - 0.99**2))
    np.testing.assert_allclose(second["w"], [expected], rtol=1e-5)
    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32}
    assert kept == {"bfloat16"}
