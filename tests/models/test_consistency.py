"""The model against itself: cached = whole, packed = apart, sharded = on one device; nobody sees the future."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen3_vl import KVCache, Qwen3VLConfig, load_hf
from models.qwen3_vl.attention import CAUSAL_BLOCK, causal_attention, dense_attention, paged_attention
from models.qwen3_vl.cache import SharedPages, unshared_table
from models.qwen3_vl.images import feature_indices, mrope_positions, pack_images
from models.qwen3_vl.visibility import Visibility
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
def extend(graphdef, params, cache, table, token_ids, positions, start, images=None):
    model = nnx.merge(graphdef, params)
    hidden, cache, _ = model.extend(
        token_ids, positions=positions, cache=cache, table=table, start=start, images=images
    )
    return model.logits(hidden), cache


def empty_cache(config: Qwen3VLConfig, rows: int, *, tokens: int, page: int, lanes: int = 1):
    """A cache with room for `tokens` in each row, and the table of rows that share nothing, in a shuffled order."""
    width = tokens // page
    cache = KVCache.zeros(config, pages=1 + rows * width // lanes, page=page, lanes=lanes, dtype=jnp.float32)
    table = unshared_table(rows, width, lanes)
    return cache, np.concatenate([part.max() + 1 - part for part in np.split(table, lanes)])


def part(one: Row, begin: int, end: int, images: slice) -> Row:
    return Row(token_ids=one.token_ids[begin:end], positions=one.positions[begin:end], images=one.images[images])


@pytest.mark.parametrize("page", [4, 8, 40])
def test_prefill_append_and_decode_are_the_whole_forward(pair, page):
    """Each row goes on where it ends, over the padding that the parts before left in the cache."""
    graphdef, params = nnx.split(pair.model)
    rows = [row(pair.config, [(2, 2), (1, 1)], seed=1), row(pair.config, [(1, 3), (2, 1)], text=3, seed=2)]
    expected = whole(graphdef, params, batch(pair.config, rows))
    turns = [int(np.flatnonzero(one.token_ids == VISION_START)[1]) for one in rows]
    ends = [len(one.token_ids) - 2 for one in rows]
    cache, table = empty_cache(pair.config, len(rows), tokens=40, page=page)
    for begins, stops, images in (([0, 0], turns, slice(0, 1)), (turns, ends, slice(1, 2))):
        parts = [part(*arguments, images) for arguments in zip(rows, begins, stops, strict=True)]
        inputs = batch(pair.config, parts, length=16, patches=16)
        found, cache = extend(
            graphdef,
            params,
            cache,
            table,
            inputs.token_ids,
            inputs.positions,
            np.array(begins, np.int32),
            inputs.images,
        )
        for number, (begin, stop) in enumerate(zip(begins, stops, strict=True)):
            np.testing.assert_allclose(found[number, : stop - begin], expected[number, begin:stop], atol=TOLERANCE)
    for step in range(2):
        start = np.array(ends, np.int32) + step
        parts = [part(one, at, at + 1, slice(0)) for one, at in zip(rows, start, strict=True)]
        inputs = batch(pair.config, parts)
        found, cache = extend(graphdef, params, cache, table, inputs.token_ids, inputs.positions, start)
        for number, at in enumerate(start):
            np.testing.assert_allclose(found[number, 0], expected[number, at], atol=TOLERANCE)


def test_what_would_be_written_past_the_table_is_dropped(pair):
    config = pair.config
    cache = KVCache.zeros(config, pages=4, page=3, dtype=jnp.float32)
    shape = (2, 3, config.text.num_key_value_heads, config.text.head_dim)
    table, index = jnp.array([[2], [3]]), jnp.array([[1, 2, 3], [0, 1, 6]])
    written = cache.write(jnp.array(1), table, index, jnp.ones(shape), 2 * jnp.ones(shape))
    assert written.keys[:, 0].sum() == 0
    assert written.keys[0, 1, :, 0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 0]]
    assert written.values[0, 1, :, 1, :, -1].tolist() == [[0, 0, 0], [0, 0, 0], [0, 2, 2], [2, 2, 0]]


def test_rows_that_share_pages_are_rows_that_own_them(pair):
    """A prompt computed once, its last page copied, for three that go on in their own ways."""
    graphdef, params = nnx.split(pair.model)
    prompt = row(pair.config, [(2, 2)], text=5, seed=7)
    held, page = len(prompt.token_ids), 5
    assert held % page  # the last page is in part the prompt's
    cache = KVCache.zeros(pair.config, pages=16, page=page, dtype=jnp.float32)
    width = held // page + 2
    first = np.arange(1, width + 1, dtype=np.int32)[None]
    inputs = batch(pair.config, [prompt])
    start = np.zeros(1, np.int32)
    _, cache = extend(graphdef, params, cache, first, inputs.token_ids, inputs.positions, start, inputs.images)
    full = held // page
    own = np.array([[width + 1], [width + 2], [width + 3]], np.int32)
    cache = cache.copy_pages(np.full((1, 3), full + 1, np.int32), own.T)
    table = np.concatenate([np.repeat(first[:, :full], 3, axis=0), own], axis=1)
    tokens = np.array([[3], [4], [5]], np.int32)
    position = np.full((3, 1, 3), int(prompt.positions.max()) + 1, np.int32)
    found, _ = extend(graphdef, params, cache, table, tokens, position, np.full(3, held, np.int32))
    for number, token in enumerate(tokens):
        positions = np.concatenate([prompt.positions, position[number]])
        one = Row(token_ids=np.append(prompt.token_ids, token), positions=positions, images=prompt.images)
        expected = whole(graphdef, params, batch(pair.config, [one]))
        np.testing.assert_allclose(found[number, 0], expected[0, held], atol=TOLERANCE)


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
    keys, values = random.standard_normal((2, 6, 2, 12, 10)).astype(np.float32)
    index = np.array([0, 3, 5, 1, 2, 4])[:, None] + np.arange(length)
    visible = np.arange(12) <= index[:, :, None]
    expected = naive_attention(queries, keys, values, visible)
    table = unshared_table(6, 3, lanes=2)
    # Layer 1 of 2, pages of 4, in 2 lanes; what is not written holds what would show if it were seen.
    paged_keys, paged_values = (np.full((2, 2, 10, 2, *page), 1e3, np.float32) for page in ((10, 4), (4, 10)))
    for number in range(6):
        for place, page in enumerate(table[number]):
            tokens = slice(4 * place, 4 * place + 4)
            paged_keys[number // 3, 1, page] = keys[number, :, tokens].swapaxes(1, 2)
            paged_values[number // 3, 1, page] = values[number, :, tokens]
    found = jax.jit(paged_attention)(
        queries, KVCache(jnp.asarray(paged_keys), jnp.asarray(paged_values)), 1, table, index
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = dense_attention(jnp.asarray(queries), keys, values, Visibility(query_index=jnp.asarray(index)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_pages_that_rows_begin_with_are_looked_at_together(most):
    """Two lanes of five rows: three share two pages, one has as many for itself, one none before its own."""
    random = np.random.default_rng(0)
    lanes, rows, page = 2, 5, 4
    cache = KVCache(
        keys=jnp.asarray(random.standard_normal((lanes, 1, 16, 2, 10, page)), jnp.float32),
        values=jnp.asarray(random.standard_normal((lanes, 1, 16, 2, page, 10)), jnp.float32),
    )
    queries = jnp.asarray(random.standard_normal((lanes * rows, 1, 6, 10)), jnp.float32)
    table = np.tile([[1, 2, 3], [4, 5, 6], [1, 2, 7], [1, 2, 8], [9, 10, 0]], (lanes, 1))
    index = np.array([8, 11, 9, 10, 5, 11, 8, 8, 10, 7])[:, None]
    groups = [(0, 2, 3), (1,), (4,)]
    parts = [group[first : first + most] for group in groups for first in range(0, len(group), most)]
    members, place = np.full((rows, most), rows - 1), np.zeros(rows, int)
    for number, part in enumerate(parts):
        members[number, : len(part)] = part
        place[list(part)] = number * most + np.arange(len(part))
    shared = SharedPages(
        members=jnp.tile(members, (lanes, 1)),
        place=jnp.tile(place, lanes),
        pages=jnp.tile(jnp.array([2, 2, 2, 2, 0]), lanes),
    )

    layer = jnp.int32(0)
    expected = jax.jit(paged_attention)(queries, cache, layer, table, index)
    found = jax.jit(paged_attention)(queries, cache, layer, table, index, shared)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_causal_attention_leaves_out_what_no_query_sees():
    """Several blocks, the last in part full, and a prompt in the first that responses in all of them see."""
    tokens = 2 * CAUSAL_BLOCK + 41
    random = np.random.default_rng(0)
    queries = jnp.asarray(random.standard_normal((2, tokens, 6, 10)), jnp.float32)
    keys, values = jnp.asarray(random.standard_normal((2, 2, 2, tokens, 10)), jnp.float32)
    segments = np.repeat([1, 2, 3, 4, 0], [60, 100, 90, 30, tokens - 280])
    ids = np.stack([segments, np.ones(tokens, int)])
    prefixes = np.where(ids > 1, 1, ids)
    index = np.broadcast_to(np.arange(tokens), ids.shape)
    visibility = Visibility(*map(jnp.asarray, (ids, prefixes, ids, index)))

    found = jax.jit(causal_attention)(queries, keys, values, visibility)
    visible = np.asarray(visibility.mask(tokens))
    some = np.array([0, 70, 127, 128, 200, 255, 256, 279])  # not of the padding: what it sees is nobody's
    expected = naive_attention(np.asarray(queries[:, some]), np.asarray(keys), np.asarray(values), visible[:, some])
    np.testing.assert_allclose(found[:, some], expected, atol=1e-5)

    def learned(attend, *inputs):
        return jnp.where(ids[..., None, None] > 0, attend(*inputs, visibility), 0).var()

    gradients = [
        jax.jit(jax.grad(functools.partial(learned, attend), argnums=(0, 1, 2)))(queries, keys, values)
        for attend in (causal_attention, dense_attention)
    ]
    for ours, whole_ in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, whole_, atol=1e-8, rtol=1e-4)


def test_bfloat16_is_near(pair):
    model = load_hf(pair.directory, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    inputs = batch(pair.config, [row(pair.config, [(2, 2)], seed=1)])
    near = jax.nn.log_softmax(whole(*nnx.split(model), inputs))
    exact = jax.nn.log_softmax(whole(*nnx.split(pair.model), inputs))
    assert near.dtype == jnp.float32
    assert np.abs(near - exact).mean() < 0.05


@pytest.mark.parametrize(
    ("name", "kernel", "shard"),
    [
        ("biased, untied", ("gate", "kernel"), (3, 18, 26)),  # layers, embed / fsdp, mlp / tensor
        # layers, experts / fsdp, embed, gate and up, mlp / tensor: nobody holds all experts of a layer
        pytest.param("experts in all layers", ("experts", "gate_up"), (2, 4, 32, 2, 8), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_are_one(name, kernel, shard):
    pair = oracle(name)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = [row(pair.config, [(1, 2)], seed=seed) for seed in range(4)]
    inputs = batch(pair.config, rows)
    expected = whole(*nnx.split(pair.model), inputs)
    model = load_hf(pair.directory, mesh, dtype=jnp.float32)
    values = dict(nnx.to_flat_state(nnx.state(model.decoder.layers)))[kernel][...]
    assert values.sharding.shard_shape(values.shape) == shard
    graphdef, params = nnx.split(model)
    with jax.set_mesh(mesh):
        found = whole(graphdef, params, shard_batch(inputs, mesh))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        cache, table = empty_cache(pair.config, 4, tokens=24, page=8, lanes=4)
        start = np.zeros(4, np.int32)
        part_, cache = extend(graphdef, params, cache, table, inputs.token_ids, inputs.positions, start, inputs.images)
        assert cache.keys.addressable_shards[0].data.size * 8 == cache.keys.size
    np.testing.assert_allclose(part_, expected, atol=TOLERANCE)
