"""Pages, pieces and calls: the parts of a rollout that need no model."""

import threading
import time

import numpy as np
import pytest

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.pages import PagePool
from hdpo_jax.rollout.strands import Strand
from hdpo_jax.tools.calls import CallPool, GivenUp
from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import mrope_positions
from tests.models.oracles import IMAGE, oracle


def test_a_page_is_free_when_its_last_holder_drops_it():
    pool = PagePool(5)
    prompt = pool.take(3)
    assert prompt is not None and sorted(prompt) == [1, 2, 3]  # never page 0
    assert pool.take(2) is None and pool.free == 1
    pool.share(prompt[:2])
    pool.drop(prompt)
    assert pool.free == 2 and pool.held == 2
    pool.drop(prompt[:2])
    assert pool.free == 4 and pool.peak == 3


@pytest.fixture(scope="module")
def config():
    return oracle("biased, untied").config


def strand(config, *parts: int | tuple[int, int]) -> Strand:
    """Text of so many tokens, and images of so many merged rows and columns."""
    merge = config.vision.spatial_merge_size
    ids, images = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [7] * part
            continue
        grid = (1, part[0] * merge, part[1] * merge)
        patches = np.full((grid[1] * grid[2], config.vision.patch_dim), len(images), np.float32)
        images.append(EncodedImage(patches=patches, grid=grid))
        ids += [IMAGE] * (part[0] * part[1])
    positions, _ = mrope_positions(np.asarray(ids), [image.grid for image in images], config)
    return Strand(ids, images, positions)


def pieces(one: Strand, shapes, config) -> list[tuple[int, int, int]]:
    found = []
    while not one.complete:
        piece = one.next_piece(shapes, config)
        found.append(tuple(piece))
        one.cached = piece.end
    return found


def test_a_strand_is_computed_in_the_first_shape_that_holds_it(config):
    shapes = ((8, 8, 0), (4, 8, 16), (4, 16, 32))
    assert pieces(strand(config, 8), shapes, config) == [(0, 0, 7)]  # all but the last token
    assert pieces(strand(config, 2, (2, 2), 1), shapes, config) == [(1, 0, 6)]
    assert pieces(strand(config, 10), shapes, config) == [(2, 0, 9)]


def test_what_no_shape_holds_is_computed_in_parts(config):
    # Text up to an image that would be one too many; the image with what follows it.
    assert pieces(strand(config, 2, (2, 2), 3, (1, 2), 4), ((1, 16, 16),), config) == [(0, 0, 9), (0, 9, 14)]
    # An image longer than a part comes with both of its parts.
    one = strand(config, 1, (2, 3), 2)
    assert pieces(one, ((1, 4, 24),), config) == [(0, 0, 4), (0, 4, 8)]
    one.cached = 4
    inputs = one.inputs(one.next_piece(((1, 4, 24),), config), config)
    assert len(inputs.images) == 1
    assert inputs.feature_index.tolist() == [3, 4, 5, -1]
    assert inputs.positions.tolist() == one.positions[4:8].tolist()


def test_features_are_numbered_from_the_first_image_of_a_piece(config):
    one = strand(config, 1, (1, 2), 1, (1, 2), 2)
    one.cached = 4
    inputs = one.inputs(one.next_piece(((1, 8, 16),), config), config)
    assert inputs.feature_index.tolist() == [0, 1, -1]
    assert [image.patches[0, 0] for image in inputs.images] == [1.0]


def test_sampled_tokens_count_on_where_the_image_let_them(config):
    one = strand(config, 1, (3, 1), 1)
    one.token_ids += [5, 6]
    one.cached = 0
    inputs = one.inputs(one.next_piece(((1, 16, 32),), config), config)
    expected, _ = mrope_positions(np.asarray(one.token_ids), [image.grid for image in one.images], config)
    assert inputs.positions.tolist() == expected[:-1].tolist()


def test_a_lane_always_holds_one_trajectory_and_a_page():
    config = RolloutConfig(slots=2, capacity=100, page=16)
    assert config.pages_a_row == 7
    assert config.pages_per_lane(1) == 15
    assert config.pages_per_lane(8) == 9


def test_a_call_that_never_answers_is_given_up_and_holds_up_nobody():
    pool = CallPool(workers=1, seconds=1.0)
    stuck, after = pool.submit(threading.Event().wait), pool.submit(lambda: 5)
    deadline = time.monotonic() + 30
    while not after.done() and time.monotonic() < deadline:
        time.sleep(pool.expire() / 2)
    assert isinstance(stuck.exception(), GivenUp)
    assert after.result() == 5
    pool.close(seconds=30)
    assert not any(thread.is_alive() for thread in pool._threads)  # the one that is stuck is not waited for


def test_a_cancelled_pool_begins_nothing():
    pool, begun = CallPool(workers=1, seconds=60), threading.Event()
    running, go_on = threading.Event(), threading.Event()

    def first():
        running.set()
        return go_on.wait(60)

    under_way, queued = pool.submit(first), pool.submit(begun.set)
    assert running.wait(60)
    pool.cancel()
    late = pool.submit(begun.set)
    go_on.set()
    pool.close()
    assert under_way.result() and queued.cancelled() and late.cancelled() and not begun.is_set()


def test_what_a_call_raises_is_its_result_and_the_pool_goes_on():
    pool = CallPool(workers=1, seconds=60)
    failed, after = pool.submit(lambda: 1 / 0), pool.submit(lambda: 5)
    assert isinstance(failed.exception(timeout=60), ZeroDivisionError)
    assert after.result(timeout=60) == 5
    pool.close()
    assert not any(thread.is_alive() for thread in pool._threads)
