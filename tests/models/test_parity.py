"""Against transformers' own Qwen3-VL in fp32: logits, gradients, greedy generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from models.logprobs import token_logprobs
from models.qwen3_vl import EncodedImage, KVCache, PackedImages, Qwen3VL
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.huggingface import file_tensors, tensor_places
from models.qwen3_vl.images import mrope_positions
from tests.models.oracles import (
    CONFIGS,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Oracle,
    Row,
    batch,
    encoded_image,
    hf_inputs,
    oracle,
    row,
)

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request) -> Oracle:
    return oracle(request.param)


@functools.partial(jax.jit, static_argnums=0)
def logprobs(graphdef, params, token_ids, positions, segment_ids, images):
    model = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(model(token_ids, positions=positions, segment_ids=segment_ids, images=images))


def ours(model: Qwen3VL, rows: list[Row]) -> list[np.ndarray]:
    inputs = batch(model.config, rows)
    found = logprobs(*nnx.split(model), inputs.token_ids, inputs.positions, inputs.segment_ids, inputs.images)
    return [np.asarray(found[number, : len(row.token_ids)]) for number, row in enumerate(rows)]


def theirs(hf, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(hf(**inputs).logits[0], dim=-1).numpy()


def test_logits_of_text_and_of_rows_with_images_of_different_shapes(pair):
    config = pair.config
    rows = [
        row(config, [], text=9),
        row(config, [(2, 3)], seed=1),
        row(config, [(1, 1), (3, 1), (1, 4)], text=2, seed=2),
    ]
    for found, one in zip(ours(pair.model, rows), rows, strict=True):
        expected = theirs(pair.hf, hf_inputs(one))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
        # The comparison would be idle if the weights were so small that all tokens were equally likely.
        assert expected.std() > 0.3


def test_logits_of_text_alone_without_positions(pair):
    one = row(pair.config, [], text=7)
    found = jax.nn.log_softmax(pair.model(jnp.asarray(one.token_ids)[None])[0])
    np.testing.assert_allclose(found, theirs(pair.hf, hf_inputs(one)), atol=TOLERANCE, rtol=0)


def test_every_part_of_the_vision_tower_shows_in_the_logits(pair):
    """What a peer got wrong unseen: deepstack dropped, tanh GELU in the mergers, one-dimensional positions."""
    one = row(pair.config, [(2, 3)], seed=1)
    expected = theirs(pair.hf, hf_inputs(one))
    flat = Row(
        token_ids=one.token_ids,
        images=one.images,
        positions=np.broadcast_to(np.arange(len(one.token_ids))[:, None], one.positions.shape),
    )
    assert np.abs(ours(pair.model, [flat])[0] - expected).max() > 10 * TOLERANCE
    blank = [EncodedImage(patches=0 * image.patches, grid=image.grid) for image in one.images]
    unseen = Row(token_ids=one.token_ids, images=blank, positions=one.positions)
    assert np.abs(ours(pair.model, [unseen])[0] - expected).max() > 100 * TOLERANCE


def test_video_beside_an_image():
    """A video is its frames, each with a time mark before it, as the processor writes them."""
    pair = oracle("biased, untied")
    config = pair.config
    picture, video = encoded_image(config, (1, 4, 2), 5), encoded_image(config, (2, 2, 6), 6)
    frames = np.split(video.patches, 2)
    ids = [7, VISION_START, *[IMAGE] * 2, VISION_END, 8]
    for number in range(2):
        ids += [30 + number, VISION_START, *[VIDEO] * 3, VISION_END]
    token_ids = np.array([*ids, 9, 10], np.int32)
    images = [picture, *(EncodedImage(patches=patches, grid=(1, 2, 6)) for patches in frames)]
    positions, _ = mrope_positions(token_ids, [image.grid for image in images], config)
    found = ours(pair.model, [Row(token_ids=token_ids, images=images, positions=positions)])[0]
    ids = torch.tensor(token_ids)[None].long()
    expected = theirs(
        pair.hf,
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.tensor(picture.patches),
            "image_grid_thw": torch.tensor([picture.grid]),
            "pixel_values_videos": torch.tensor(video.patches),
            "video_grid_thw": torch.tensor([video.grid]),
            "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        },
    )
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_gradients(pair):
    """Of the mean log-probability of a row, for every tensor of the checkpoint, by its name there."""
    one = row(pair.config, [(2, 1), (1, 2)], text=3, seed=3)
    targets = np.roll(one.token_ids, -1)
    inputs = batch(pair.config, [one])
    graphdef, params = nnx.split(pair.model)

    @jax.jit
    @jax.grad
    def gradients(params):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden_states(inputs.token_ids, positions=inputs.positions, images=inputs.images)
        return jnp.mean(token_logprobs(hidden, model.head, jnp.asarray(targets)[None], block=5))

    places = tensor_places(pair.config)
    dtypes = dict.fromkeys(places, np.dtype(np.float32))
    tensor = file_tensors(nnx.merge(graphdef, gradients(params)), places, dtypes)
    found = {name: np.asarray(tensor(name, True)) for name in places}
    pair.hf.zero_grad()
    logits = pair.hf(**hf_inputs(one)).logits[0]
    torch.log_softmax(logits, -1)[torch.arange(len(targets)), torch.tensor(targets).long()].mean().backward()
    expected = {name: parameter.grad for name, parameter in pair.hf.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        reference = np.zeros(found[name].shape) if gradient is None else gradient.numpy()
        scale = np.linalg.norm(reference)
        assert np.linalg.norm(found[name] - reference) <= 1e-3 * scale + 1e-7, name


def test_greedy_generation_token_for_token(pair):
    config, new_tokens = pair.config, 12
    one = row(config, [(2, 2), (1, 3)], seed=4)
    length = len(one.token_ids)
    generated = pair.hf.generate(
        **hf_inputs(one), do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
    )
    expected = generated[0, length:].tolist()

    graphdef, params = nnx.split(pair.model)

    @jax.jit
    def generate(params, token_ids, positions, images: PackedImages):
        model = nnx.merge(graphdef, params)
        width = -(-(length + new_tokens) // 8)
        cache = KVCache.zeros(config, pages=1 + width, page=8, dtype=jnp.float32)
        table = unshared_table(1, width)
        start = jnp.zeros(1, jnp.int32)
        hidden, cache, _ = model.extend(
            token_ids, positions=positions, cache=cache, table=table, start=start, images=images
        )
        first = jnp.argmax(model.logits(hidden[:, -1]), -1)
        position = positions[:, -1:].max() + 1

        def step(carry, number):
            cache, token = carry
            hidden, cache, _ = model.extend(
                token[:, None],
                positions=jnp.broadcast_to(position + number, (1, 1, 3)),
                cache=cache,
                table=table,
                start=start + length + number,
            )
            return (cache, jnp.argmax(model.logits(hidden[:, 0]), -1)), token

        return jax.lax.scan(step, (cache, first), jnp.arange(new_tokens))[1][:, 0]

    inputs = batch(config, [one])
    found = generate(params, inputs.token_ids, inputs.positions, inputs.images)
    assert found.tolist() == expected
