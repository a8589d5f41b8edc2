"""Logical axes to layouts: specs, parameters of an NNX module, batches, constraints in programs."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import (
    RULES,
    ShardingRules,
    constrain,
    make_mesh,
    named_sharding,
    param_shardings,
    replicate,
    shard_batch,
    spec,
)


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.up = nnx.Param(jax.random.normal(rngs.params(), (8, 6)), axes=("embed", "mlp"))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (6, 8)), axes=("mlp", "embed"))
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        hidden = constrain(x @ self.up[...], "batch", "tokens", "mlp")
        return constrain(x * self.scale[...] + jnp.tanh(hidden) @ self.down[...], "batch", "tokens", None)


def stacked(layers: int) -> tuple[Any, Any]:
    """A graph definition and the parameters of `layers` layers on a leading axis."""
    split = [nnx.split(Layer(rngs=nnx.Rngs(seed))) for seed in range(layers)]
    return split[0][0], jax.tree.map(lambda *arrays: jnp.stack(arrays), *[params for _, params in split])


def forward(graphdef, params, x):
    def body(x, layer):
        block: Layer = nnx.merge(graphdef, layer)
        return block(x), None

    return jax.lax.scan(body, x, params)[0]


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (8, 6), P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 8, 4, 5), P(None, "fsdp", "tensor")),
        (("batch", "tokens"), (8, 5), P(("data", "fsdp"))),
        # 2 rows on data 2 x fsdp 2: data splits them, fsdp does not (all or nothing would replicate them on 4 devices).
        (("batch", "tokens"), (2, 5), P("data")),
        (("vocab", "embed"), (7, 8), P(None, "fsdp")),
        # A mesh axis splits one dimension: naming it twice is an error in JAX.
        (("merged", "merged"), (8, 8), P("tensor")),
        (("batch", "tokens", "embed"), (8, 5, 8), P(("data", "fsdp"))),
        ((None, "mlp"), None, P(None, "tensor")),
        ((), (), P()),
    ],
)
def test_spec(axes, shape, expected):
    assert spec(RULES, axes, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), shape) == expected


def test_axes_of_size_one_leave_no_trace():
    assert spec(RULES, ("batch", "embed"), make_mesh({"tensor": 8}), (8, 8)) == P()


def test_another_strategy_is_another_mapping():
    rules = ShardingRules(embed=("fsdp", "tensor"), mlp=None)
    assert spec(rules, ("embed", "mlp"), make_mesh({"fsdp": 4, "tensor": 2}), (8, 6)) == P(("fsdp", "tensor"))


def test_unknown_names_and_wrong_ranks_are_one_line():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match="logical axis 'hidden' has no rule; expected one of vocab, embed"):
        spec(RULES, ("hidden",), mesh)
    with pytest.raises(ValueError, match=r"\('embed',\) for an array of shape \(2, 3\); expected one name a dimension"):
        spec(RULES, ("embed",), mesh, (2, 3))


def test_names_need_no_mesh_and_survive():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphdef, params = stacked(3)
        abstract: Any = nnx.split(nnx.eval_shape(lambda: Layer(rngs=nnx.Rngs(0))))[1]
        doubled = jax.jit(lambda params: jax.tree.map(lambda x: 2 * x, params))(params)
    found = [tree["up"].get_metadata()["axes"] for tree in (params, abstract, doubled)]
    assert found == [("embed", "mlp")] * 3
    assert nnx.merge(graphdef, params).down.get_metadata()["axes"] == ("mlp", "embed")


def test_parameters_and_optimizer_state_are_laid_out_alike():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    _, params = stacked(3)
    shardings = param_shardings(params, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    assert shardings["up"].get_value().spec == P(None, "fsdp", "tensor")
    assert shardings["down"].get_value().spec == P(None, "tensor", "fsdp")
    assert shardings["scale"].get_value().spec == P()

    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    placed = jax.jit(optimizer.init, out_shardings=param_shardings(state, mesh))(jax.device_put(params, shardings))
    assert placed[0].mu["up"][...].sharding == shardings["up"].get_value()
    assert placed[0].count.sharding.spec == P()


def test_parameters_can_be_made_in_place():
    mesh = make_mesh({"fsdp": 8})

    def init():
        return nnx.split(Layer(rngs=nnx.Rngs(0)))[1]

    params = jax.jit(init, out_shardings=param_shardings(jax.eval_shape(init), mesh))()
    assert params["up"][...].addressable_shards[0].data.shape == (1, 6)
    np.testing.assert_array_equal(params["up"][...], init()["up"][...])


def test_a_program_on_eight_devices_is_the_program_on_one():
    graphdef, params = stacked(3)
    x = np.random.default_rng(0).normal(size=(8, 5, 8)).astype(np.float32)

    def loss(params, x):
        return jnp.square(forward(graphdef, params, x)).mean()

    expected = jax.jit(jax.value_and_grad(loss))(params, x)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh))
        found = jax.jit(jax.value_and_grad(loss))(placed, shard_batch(x, mesh))
    # Sums of fp32 in another order: to some roundings of their largest terms, which are about 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_constrain_places_what_a_program_makes():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def made():
        return constrain(jnp.zeros((8, 3)), "batch", None)

    assert isinstance(jax.jit(made)().sharding, jax.sharding.SingleDeviceSharding)
    with jax.set_mesh(mesh):
        assert jax.jit(made)().sharding == named_sharding(mesh, "batch", None)


def test_constrain_inside_shard_map_leaves_mapped_axes_alone():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def body(rows):
        return constrain(rows, "batch", None)

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(body, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")))
        np.testing.assert_array_equal(jax.jit(mapped)(jnp.ones((8, 3))), np.ones((8, 3)))


def test_shard_batch_splits_rows_wherever_they_stand():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    batch = {"rows": np.arange(2 * 3 * 8 * 5).reshape(2, 3, 8, 5), "micro_batches": np.array([3, 3]), "odd": None}
    placed = shard_batch(batch, mesh, axis=2)
    assert placed["rows"].sharding.spec == P(None, None, ("data", "fsdp"))
    assert placed["micro_batches"].sharding.spec == P()
    np.testing.assert_array_equal(placed["rows"], batch["rows"])
    assert shard_batch({"rows": jnp.ones((3, 2))}, mesh)["rows"].is_fully_replicated  # no axis divides 3 rows


def test_replicate():
    mesh = make_mesh({"fsdp": 8})
    placed = replicate({"a": np.arange(3), "b": 1.5}, mesh)
    assert placed["a"].sharding == NamedSharding(mesh, P())
    assert placed["b"] == 1.5
