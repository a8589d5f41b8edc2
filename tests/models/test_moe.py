"""The mixture of experts against a plain sum over all experts, on one device and wherever a mesh puts it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen3_vl import MoEConfig, TextConfig
from models.qwen3_vl.layers import Precision
from models.qwen3_vl.moe import SparseMLP
from sharding import make_mesh, param_shardings, shard_batch

WIDTH, HIDDEN, CHOSEN = 16, 6, 3


@functools.cache
def block(experts: int) -> tuple[nnx.GraphDef, nnx.State]:
    moe = MoEConfig(num_experts=experts, num_experts_per_tok=CHOSEN, moe_intermediate_size=HIDDEN)
    config = TextConfig(hidden_size=WIDTH, initializer_range=0.3, moe=moe)
    return nnx.split(SparseMLP(config, moe, precision=Precision(jnp.float32, jnp.float32), rngs=nnx.Rngs(0)))


def every_expert(mlp: SparseMLP, x: jax.Array) -> jax.Array:
    """All experts look at all tokens; those that were not chosen count for nothing."""
    logits = x @ mlp.router[...]
    limit = jnp.sort(logits)[..., -CHOSEN, None]
    share = jax.nn.softmax(jnp.where(logits >= limit, logits, -jnp.inf))
    gate, up = jnp.einsum("btw,ewgh->gbteh", x, mlp.gate_up[...])
    return jnp.einsum("bteh,ehw,bte->btw", jax.nn.silu(gate) * up, mlp.down[...], share)


def chosen_experts(mlp: SparseMLP, x: jax.Array) -> jax.Array:
    return mlp(x)[0]


def learned(graphdef: nnx.GraphDef, look, params: nnx.State, x: jax.Array):
    y = look(nnx.merge(graphdef, params), x)
    return jnp.sum(jnp.sin(y) * jnp.linspace(-1, 1, y.size).reshape(y.shape)), y


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward_and_backward(graphdef, look, params, x):
    return jax.value_and_grad(functools.partial(learned, graphdef, look), argnums=(0, 1), has_aux=True)(params, x)


# Few tokens go to where the experts are, experts to where many tokens are; one row is on all devices anyhow. Six
# experts are no four devices': they are split by their width.
@pytest.mark.parametrize(
    ("experts", "axes", "shape"),
    [
        (8, {"data": 2, "fsdp": 2, "tensor": 2}, (4, 3)),
        (8, {"data": 2, "fsdp": 2, "tensor": 2}, (4, 60)),
        (8, {"fsdp": 4, "tensor": 2}, (1, 5)),
        (6, {"fsdp": 4, "tensor": 2}, (4, 5)),
        (6, {"fsdp": 4, "tensor": 2}, (1, 5)),
    ],
    ids=["tokens travel", "experts travel", "one row", "width is split", "one row, width is split"],
)
def test_wherever_it_is_computed_it_is_the_sum_over_the_chosen_experts(experts, axes, shape):
    graphdef, params = block(experts)
    x = np.random.default_rng(0).normal(size=(*shape, WIDTH)).astype(np.float32)
    expected = forward_and_backward(graphdef, every_expert, params, x)
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh))
        spread = forward_and_backward(graphdef, chosen_experts, placed, shard_batch(x, mesh))
    for found in (forward_and_backward(graphdef, chosen_experts, params, x), spread):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in jax.tree.leaves(expected[1]))


def test_none_is_dropped_where_all_tokens_choose_the_same_experts():
    graphdef, params = block(8)
    mlp = nnx.merge(graphdef, params)
    # Positive inputs: experts 0 to 2 come out on top everywhere, the other five get nothing.
    mlp.router[...] = jnp.where(jnp.arange(8) < CHOSEN, 1.0, -1.0) * jnp.ones((WIDTH, 1)) + 0.01 * mlp.router[...]
    x = jnp.asarray(np.random.default_rng(1).uniform(0.1, 1, (4, 20, WIDTH)), jnp.float32)
    assert set(np.unique(mlp.route(x)[0])) == {0, 1, 2}
    np.testing.assert_allclose(mlp(x)[0], every_expert(mlp, x), atol=1e-5)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    params = nnx.state(mlp)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh))
        for part in (x, x[:, :2]):  # experts travel, tokens travel
            (_, found), _ = forward_and_backward(graphdef, chosen_experts, placed, shard_batch(part, mesh))
            np.testing.assert_allclose(found, every_expert(mlp, part), atol=1e-5)
