"""The model laid out for decoding is the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen3_vl import Cache, KVCache, Qwen3VL, decoding_layout, load_hf
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.decoding import FEW_ROWS, TurnedLinear, laid_out
from models.qwen3_vl.runs import LayerRuns
from models.qwen3_vl.text import TextLayer
from sharding import make_mesh
from tests.models.oracles import CONFIGS, oracle

ROWS, PAGE, PAGES_A_ROW = 8, 4, 2


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
def test_every_step_gives_the_same_logits(name, dtype, tolerance):
    model = load_hf(oracle(name).directory, dtype=jnp.dtype(dtype))
    turned = laid_out(model)
    out = layer(turned, 1).out
    assert isinstance(out, TurnedLinear)
    assert out.kernel[...].dtype == dtype
    assert isinstance(model.decoder.layers, TextLayer | LayerRuns), "the model itself is to stay as it was"
    np.testing.assert_allclose(steps(turned), steps(model), atol=tolerance)


def test_eight_devices_lay_it_out_as_one_does():
    pair = oracle("biased, untied")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = load_hf(pair.directory, mesh, dtype=jnp.float32)
    structure, lay_out = decoding_layout(model, platform="cpu", rows=ROWS)
    with jax.set_mesh(mesh):
        turned = nnx.merge(structure, lay_out(nnx.state(model)))
        gate = layer(turned, 1).gate
        assert isinstance(gate, TurnedLinear)
        kernel = gate.kernel[...]
        assert kernel.shape == (52, 36)
        assert kernel.sharding.shard_shape(kernel.shape) == (26, 18)  # mlp / tensor, embed / fsdp
        found = steps(turned, lanes=4)
    np.testing.assert_allclose(found, steps(pair.model), atol=2e-5)


@pytest.mark.parametrize(("platform", "rows"), [("tpu", 1), ("gpu", 32), ("cpu", FEW_ROWS + 1)])
def test_elsewhere_parameters_stay_what_they_are(platform, rows):
    graphdef, params = nnx.split(oracle("biased, untied").model)
    structure, lay_out = decoding_layout(nnx.merge(graphdef, params), platform=platform, rows=rows)
    assert structure == graphdef
    assert lay_out(params) is params


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stays_as_it_is_is_not_copied(name):
    model = load_hf(oracle(name).directory, dtype=jnp.float32)
    params = nnx.state(model)
    _, lay_out = decoding_layout(model, platform="cpu", rows=FEW_ROWS)
    found = lay_out(params)
    for kept in ("embedding", "vision"):
        for ours, theirs in zip(jax.tree.leaves(found[kept]), jax.tree.leaves(params[kept]), strict=True):
            assert ours is theirs
    assert ("output" in found, "turned_head" in found) == (False, "output" in params)


def layer(model: Qwen3VL, number: int):
    assert isinstance(model.decoder.layers, nnx.List)
    return model.decoder.layers[number]


def steps(model: Qwen3VL, lanes: int = 1) -> jax.Array:
    """Logits [rows, steps, vocab] of a few tokens, fed one at a time."""
    graphdef, params = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, 90, (ROWS, 5)).astype(np.int32)
    cache: Cache = KVCache.zeros(
        model.config, pages=1 + ROWS * PAGES_A_ROW // lanes, page=PAGE, lanes=lanes, dtype=jnp.float32
    )
    table = jnp.asarray(unshared_table(ROWS, PAGES_A_ROW, lanes))

    @jax.jit
    def step(params: nnx.State, cache: Cache, tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, Cache]:
        model, start = nnx.merge(graphdef, params), jnp.full(ROWS, at)
        positions = jnp.broadcast_to(at, (ROWS, 1, 3))
        hidden, cache, _ = model.extend(tokens, positions=positions, cache=cache, table=table, start=start)
        return model.logits(hidden[:, 0]), cache

    found = []
    for at in range(tokens.shape[1]):
        logits, cache = step(params, cache, tokens[:, at : at + 1], jnp.int32(at))
        found.append(logits)
    return jnp.stack(found, axis=1)
