"""The model laid out for decoding is the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen3_vl import KVCache, Qwen3VL, for_decoding, load_hf
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.decoding import TurnedLinear
from sharding import make_mesh
from tests.models.oracles import CONFIGS, Oracle, oracle

ROWS, PAGE, PAGES_A_ROW = 8, 4, 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_gives_the_same_logits(name):
    pair = oracle(name)
    np.testing.assert_allclose(steps(for_decoding(pair.model, "cpu")), steps(pair.model), atol=2e-5)


def test_eight_devices_lay_it_out_as_one_does():
    pair = oracle("biased, untied")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = load_hf(pair.directory, mesh, dtype=jnp.float32)
    with jax.set_mesh(mesh):
        laid_out = nnx.merge(*nnx.jit(lambda model: nnx.split(for_decoding(model, "cpu")))(model))
        gate = layer(laid_out, 1).gate
        assert isinstance(gate, TurnedLinear)
        assert gate.kernel.shape == (52, 36)
        kernel = gate.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape) == (26, 18)  # mlp / tensor, embed / fsdp
        found = steps(laid_out, lanes=4)
    np.testing.assert_allclose(found, steps(pair.model), atol=2e-5)


def test_accelerators_get_the_model_as_it_is():
    pair = oracle("biased, untied")
    assert for_decoding(pair.model, "tpu") is pair.model
    laid_out = for_decoding(pair.model, "cpu")
    assert for_decoding(laid_out, "cpu") is laid_out


def test_the_model_itself_stays_as_it_was():
    pair: Oracle = oracle("biased, untied")
    before = jax.tree.map(jnp.shape, nnx.state(pair.model))
    for_decoding(pair.model, "cpu")
    assert jax.tree.map(jnp.shape, nnx.state(pair.model)) == before


def layer(model: Qwen3VL, number: int):
    assert isinstance(model.decoder.layers, nnx.List)
    return model.decoder.layers[number]


def steps(model: Qwen3VL, lanes: int = 1) -> jax.Array:
    """Logits [rows, steps, vocab] of a few tokens, fed one at a time."""
    graphdef, params = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, 90, (ROWS, 5)).astype(np.int32)
    cache = KVCache.zeros(
        model.config, pages=1 + ROWS * PAGES_A_ROW // lanes, page=PAGE, lanes=lanes, dtype=jnp.float32
    )
    table = jnp.asarray(unshared_table(ROWS, PAGES_A_ROW, lanes))

    @jax.jit
    def step(params: nnx.State, cache: KVCache, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, KVCache]:
        model, start = nnx.merge(graphdef, params), jnp.full(ROWS, at)
        positions = jnp.broadcast_to(at, (ROWS, 1, 3))
        hidden, cache = model.extend(tokens, positions=positions, cache=cache, table=table, start=start)
        return model.logits(hidden[:, 0]), cache

    found = []
    for at in range(tokens.shape[1]):
        logits, cache = step(params, cache, tokens[:, at : at + 1], jnp.int32(at))
        found.append(logits)
    return jnp.stack(found, axis=1)
