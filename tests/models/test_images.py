"""Patch geometry and M-RoPE positions against transformers', and images that do not fit."""

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import feature_indices, mrope_positions, pack_images
from tests.models.oracles import CONFIGS, IMAGE, VISION_END, VISION_START, encoded_image, hf_inputs, oracle, row

GRIDS = [(1, 2, 2), (1, 4, 10), (1, 14, 2), (1, 10, 10), (3, 4, 6)]


@pytest.fixture(scope="module")
def config():
    return oracle("biased, untied").config


def test_geometry_of_patches(config):
    images = [encoded_image(config, grid) for grid in GRIDS]
    total = sum(len(image.patches) for image in images)
    packed = pack_images(config, [images, images[:1]], np.full((2, 3), -1), total + 4)
    grids, merge = torch.tensor(GRIDS), config.vision.spatial_merge_size
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids, config.vision.position_side, "bilinear", align_corners=True, spatial_merge_size=merge
    )
    np.testing.assert_array_equal(packed.coordinates[0, :total], get_vision_position_ids(grids, merge))
    np.testing.assert_allclose(packed.weights[0, :total], weights, atol=1e-6)
    # Where a weight is zero, it does not matter which entry of the table it is for.
    used = packed.weights[0, :total] > 1e-6
    np.testing.assert_array_equal(packed.corners[0, :total][used], indices.numpy()[used])
    assert packed.patches[0, :total].tolist() == np.concatenate([image.patches for image in images]).tolist()


def test_segments_are_frames_and_zero_is_padding(config):
    images = [encoded_image(config, (1, 2, 2)), encoded_image(config, (2, 2, 4))]
    packed = pack_images(config, [images, []], np.full((2, 1), -1), 24)
    assert packed.segment_ids[0].tolist() == [1] * 4 + [2] * 8 + [3] * 8 + [0] * 4
    assert not packed.segment_ids[1].any()


def test_images_that_do_not_fit(config):
    image = encoded_image(config, (1, 4, 4))
    with pytest.raises(ValueError, match="row 1 holds images of 32 patches; there is room for 16"):
        pack_images(config, [[image], [image, image]], np.zeros((2, 1)), 16)
    with pytest.raises(ValueError, match="18 patches a row is not a multiple of 4"):
        pack_images(config, [[]], np.zeros((1, 1)), 18)
    with pytest.raises(ValueError, match="grid .* came with 3 patches"):
        EncodedImage(patches=np.zeros((3, 5), np.float32), grid=(1, 2, 2))
    with pytest.raises(ValueError, match="3 x 4 patches can not be merged in blocks of 2 x 2"):
        pack_images(config, [[encoded_image(config, (1, 3, 4))]], np.zeros((1, 1)), 12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [[], [(1, 1)], [(2, 5), (4, 1), (1, 1)]])
def test_positions(name, sizes):
    pair = oracle(name)
    one = row(pair.config, sizes)
    if not sizes:
        assert one.positions.tolist() == [[k, k, k] for k in range(len(one.token_ids))]
        return
    inputs = hf_inputs(one)
    expected, delta = pair.hf.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    np.testing.assert_array_equal(one.positions, expected[:, 0].T)
    grids = [image.grid for image in one.images]
    _, following = mrope_positions(one.token_ids, grids, pair.config)
    assert following == len(one.token_ids) + int(delta)


def test_positions_of_an_appended_turn_continue(config):
    whole = row(config, [(2, 3), (1, 2)])
    grids = [image.grid for image in whole.images]
    cut = int(np.flatnonzero(whole.token_ids == VISION_START)[1])
    first, following = mrope_positions(whole.token_ids[:cut], grids[:1], config)
    second, _ = mrope_positions(whole.token_ids[cut:], grids[1:], config, start=following)
    np.testing.assert_array_equal(np.concatenate([first, second]), whole.positions)


def test_placeholders_and_images_out_of_step(config):
    ids = np.array([5, VISION_START, IMAGE, IMAGE, VISION_END])
    with pytest.raises(ValueError, match="holds 2 image tokens; its 1 images need 4"):
        mrope_positions(ids, [(1, 4, 4)], config)
    with pytest.raises(ValueError, match="holds 2 image tokens; its 0 images need 0"):
        mrope_positions(ids, [], config)
    with pytest.raises(ValueError, match="interrupted by text"):
        mrope_positions(np.array([IMAGE, 3, IMAGE]), [(1, 2, 4)], config)


def test_feature_indices():
    assert feature_indices(np.array([1, IMAGE, IMAGE, 2, IMAGE]), IMAGE).tolist() == [-1, 0, 1, -1, 2]
