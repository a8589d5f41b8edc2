"""The model against itself: cached = whole, packed = apart, sharded = on one device; nobody sees the future."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen3_vl import KVCache, load_hf
from models.qwen3_vl.attention import Visibility, attention, cached_attention
from models.qwen3_vl.images import feature_indices, mrope_positions, pack_images
from sharding import make_mesh, shard_batch
from tests.models.oracles import IMAGE, VISION_START, Batch, Oracle, Row, batch, oracle, row

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pair() -> Oracle:
    return oracle("biased, untied")


traced: list[tuple[int, ...]] = []


@functools.partial(jax.jit, static_argnums=0)
def whole(graphdef, params, inputs: Batch, prefix_ids=None):
    traced.append(inputs.token_ids.shape)  # runs once a compilation
    model = nnx.merge(graphdef, params)
    return model(
        inputs.token_ids,
        positions=inputs.positions,
        segment_ids=inputs.segment_ids,
        prefix_ids=prefix_ids,
        images=inputs.images,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(graphdef, params, cache, token_ids, positions, start, images=None):
    model = nnx.merge(graphdef, params)
    hidden, cache = model.extend(token_ids, positions=positions, cache=cache, start=start, images=images)
    return model.logits(hidden), cache


def part(one: Row, begin: int, end: int, images: slice) -> Row:
    return Row(token_ids=one.token_ids[begin:end], positions=one.positions[begin:end], images=one.images[images])


def test_prefill_append_and_decode_are_the_whole_forward(pair):
    """Each row goes on where it ends, over the padding that the parts before left in the cache."""
    graphdef, params = nnx.split(pair.model)
    rows = [row(pair.config, [(2, 2), (1, 1)], seed=1), row(pair.config, [(1, 3), (2, 1)], text=3, seed=2)]
    expected = whole(graphdef, params, batch(pair.config, rows))
    turns = [int(np.flatnonzero(one.token_ids == VISION_START)[1]) for one in rows]
    ends = [len(one.token_ids) - 2 for one in rows]
    cache = KVCache.zeros(pair.config, len(rows), 40, jnp.float32)
    for begins, stops, images in (([0, 0], turns, slice(0, 1)), (turns, ends, slice(1, 2))):
        parts = [part(*arguments, images) for arguments in zip(rows, begins, stops, strict=True)]
        inputs = batch(pair.config, parts, length=16, patches=16)
        found, cache = extend(
            graphdef, params, cache, inputs.token_ids, inputs.positions, np.array(begins, np.int32), inputs.images
        )
        for number, (begin, stop) in enumerate(zip(begins, stops, strict=True)):
            np.testing.assert_allclose(found[number, : stop - begin], expected[number, begin:stop], atol=TOLERANCE)
    for step in range(2):
        start = np.array(ends, np.int32) + step
        parts = [part(one, at, at + 1, slice(0)) for one, at in zip(rows, start, strict=True)]
        inputs = batch(pair.config, parts)
        found, cache = extend(graphdef, params, cache, inputs.token_ids, inputs.positions, start)
        for number, at in enumerate(start):
            np.testing.assert_allclose(found[number, 0], expected[number, at], atol=TOLERANCE)


def test_what_would_be_written_past_the_end_is_dropped(pair):
    config = pair.config
    cache = KVCache.zeros(config, 2, 5, jnp.float32)
    shape = (2, 3, config.text.num_key_value_heads, config.text.head_dim)
    index = jnp.array([[4, 5, 6], [1, 2, 3]])
    written = cache.write(jnp.array(1), index, jnp.ones(shape), 2 * jnp.ones(shape))
    assert written.keys[0].sum() == 0
    assert written.keys[1, :, 0, :, 0].tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 0]]
    assert written.values[1, :, 1, :, -1].tolist() == [[0, 0, 0, 0, 2], [0, 2, 2, 2, 0]]


def test_packed_with_a_shared_prompt_is_apart(pair):
    """A prompt with an image, two responses that see it and not each other, and a stranger, in one row."""
    config = pair.config
    graphdef, params = nnx.split(pair.model)
    random = np.random.default_rng(3)
    prompt, stranger = row(config, [(2, 2)], seed=5), row(config, [(1, 2)], seed=6)
    responses = [random.integers(0, 90, length).astype(np.int32) for length in (4, 3)]
    grid = [prompt.images[0].grid]
    joined = []
    for response in responses:
        token_ids = np.concatenate([prompt.token_ids, response])
        positions, _ = mrope_positions(token_ids, grid, config)
        joined.append(Row(token_ids=token_ids, positions=positions, images=prompt.images))
    apart = whole(graphdef, params, batch(config, [*joined, stranger]))

    length = len(prompt.token_ids)
    pieces = [prompt, *(part(one, length, len(one.token_ids), slice(0)) for one in joined), stranger]
    sizes = [len(piece.token_ids) for piece in pieces]
    token_ids = np.concatenate([piece.token_ids for piece in pieces])
    inputs = Batch(
        token_ids=np.pad(token_ids, (0, 2))[None],
        positions=np.pad(np.concatenate([piece.positions for piece in pieces]), ((0, 2), (0, 0)))[None],
        segment_ids=np.pad(np.repeat([1, 2, 3, 4], sizes), (0, 2))[None],
        images=pack_images(
            config,
            [[*prompt.images, *stranger.images]],
            np.pad(feature_indices(token_ids, IMAGE), (0, 2), constant_values=-1)[None],
            28,
        ),
    )
    prefix_ids = np.pad(np.repeat([1, 1, 1, 4], sizes), (0, 2))[None]
    packed = whole(graphdef, params, inputs, prefix_ids)[0]
    found = np.split(packed[: sum(sizes)], np.cumsum(sizes)[:-1])
    np.testing.assert_allclose(found[0], apart[0, :length], atol=TOLERANCE)
    for number, response in enumerate(responses):
        expected = apart[number, length : length + len(response)]
        np.testing.assert_allclose(found[1 + number], expected, atol=TOLERANCE)
    np.testing.assert_allclose(found[3], apart[2, : sizes[3]], atol=TOLERANCE)
    assert np.isfinite(packed).all()  # padding too: NaN there would poison the gradients


def test_images_of_other_shapes_do_not_compile_again(pair):
    graphdef, params = nnx.split(pair.model)
    for sizes in ([(2, 2)], [(1, 4)], [(1, 1), (1, 2)], []):
        inputs = batch(pair.config, [row(pair.config, sizes, text=3)], length=17, patches=16)
        whole(graphdef, params, inputs)
    assert traced.count((1, 17)) == 1


def test_nobody_sees_the_future_or_another_segment(pair):
    """By gradients: of the logits at one place, with respect to every token's embedding and every patch."""
    config = pair.config
    graphdef, params = nnx.split(pair.model)
    one = row(config, [(1, 2), (2, 1)], text=3, seed=7)
    ids = np.where(one.token_ids == IMAGE, IMAGE, np.arange(len(one.token_ids)))  # every other token once
    inputs = batch(config, [Row(token_ids=ids, positions=one.positions, images=one.images)], patches=20)
    # Two segments: the first ends before the second image.
    boundary, place = 8, 13
    segments = np.where(np.arange(len(ids)) < boundary, 1, 2)[None]

    @jax.jit
    @jax.grad
    def influence(inputs_, segment_ids, at):
        params, patches = inputs_
        model = nnx.merge(graphdef, params)
        assert inputs.images is not None
        images = inputs.images._replace(patches=patches)
        found = model(inputs.token_ids, positions=inputs.positions, segment_ids=segment_ids, images=images)
        return jnp.sum(jnp.sin(found[0, at]))

    assert inputs.images is not None
    for segment_ids, at in ((np.ones_like(segments), boundary - 1), (segments, place)):
        gradients, patches = influence((params, inputs.images.patches), segment_ids, at)
        visible = (np.arange(len(ids)) <= at) & (segment_ids[0] == segment_ids[0, at])
        text = ids != IMAGE
        touched = np.abs(gradients["embedding"][...]).sum(-1)[ids] > 0
        np.testing.assert_array_equal(touched[text], visible[text])
        first, second, padding = np.split(np.abs(patches[0]).sum(-1) > 0, [8, 16])
        images_visible = [visible[ids == IMAGE][:2].all(), visible[ids == IMAGE][2:].all()]
        assert [first.all(), second.all()] == images_visible
        assert [first.any(), second.any()] == images_visible
        assert not padding.any()
    assert images_visible == [False, True]


def naive_attention(queries, keys, values, visible):
    found = np.zeros(queries.shape)
    group = queries.shape[2] // keys.shape[1]
    for b, t, h in np.ndindex(queries.shape[:3]):
        seen = visible[b, t]
        scores = keys[b, h // group][seen] @ queries[b, t, h] / np.sqrt(queries.shape[-1])
        shares = np.exp(scores - scores.max())
        found[b, t, h] = shares / shares.sum() @ values[b, h // group][seen]
    return found


@pytest.mark.parametrize("length", [1, 4])
def test_attention_to_a_cache(length):
    random = np.random.default_rng(0)
    queries = random.standard_normal((6, length, 6, 10)).astype(np.float32)
    keys, values = random.standard_normal((2, 3, 6, 2, 9, 10)).astype(np.float32)
    index = np.array([0, 3, 5, 1, 2, 4])[:, None] + np.arange(length)
    visible = np.arange(9) <= index[:, :, None]
    expected = naive_attention(queries, keys[1], values[1], visible)
    found = jax.jit(cached_attention)(queries, keys, values, 1, index)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = attention(jnp.asarray(queries), keys[1], values[1], Visibility(query_index=jnp.asarray(index)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_is_near(pair):
    model = load_hf(pair.directory, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    inputs = batch(pair.config, [row(pair.config, [(2, 2)], seed=1)])
    near = jax.nn.log_softmax(whole(*nnx.split(model), inputs))
    exact = jax.nn.log_softmax(whole(*nnx.split(pair.model), inputs))
    assert near.dtype == jnp.float32
    assert np.abs(near - exact).mean() < 0.05


def test_eight_devices_are_one(pair):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = [row(pair.config, [(1, 2)], seed=seed) for seed in range(4)]
    inputs = batch(pair.config, rows)
    expected = whole(*nnx.split(pair.model), inputs)
    model = load_hf(pair.directory, mesh, dtype=jnp.float32)
    gate = model.decoder.layers.gate.kernel[...]
    assert gate.sharding.shard_shape(gate.shape) == (3, 18, 26)  # layers, embed / fsdp, mlp / tensor
    graphdef, params = nnx.split(model)
    with jax.set_mesh(mesh):
        found = whole(graphdef, params, shard_batch(inputs, mesh))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        cache = KVCache.zeros(pair.config, 4, 24, jnp.float32)
        start = np.zeros(4, np.int32)
        part_, cache = extend(graphdef, params, cache, inputs.token_ids, inputs.positions, start, inputs.images)
    np.testing.assert_allclose(part_, expected, atol=TOLERANCE)
