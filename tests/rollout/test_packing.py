import jax
import numpy as np
import pytest

from hdpo_jax.data.tiny_checkpoint import TINY
from hdpo_jax.rollout.packing import (
    PackingError,
    RowShape,
    assign_rows,
    conversation_family,
    fill_rows,
    group_family,
    padding_share,
)
from hdpo_jax.types import Prompt, StopReason, Trajectory
from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import mrope_positions

CONFIG = TINY
IMAGE = CONFIG.image_token_id
PROMPT = Prompt(id="p", messages=(), images=(), ground_truth="", data_source="test")


def image(rows: int, columns: int) -> EncodedImage:
    return EncodedImage(patches=np.ones((rows * columns, CONFIG.vision.patch_dim), np.float32), grid=(1, rows, columns))


def trajectory(group: int, sample: int, response: int, *, observed: bool = False) -> Trajectory:
    """Prompt: 2 text tokens, an image of 6 placeholders, 2 text tokens; then a response, with a tool's image or not."""
    prompt = [11, 12, *[IMAGE] * 6, 13, 14]
    answer = list(range(100 + 10 * sample, 100 + 10 * sample + response))
    ids, sampled, images = prompt + answer, [False] * 10 + [True] * response, [image(4, 6)]
    if observed:
        ids += [20, *[IMAGE] * 2, 21, 300 + sample]
        sampled += [False] * 4 + [True]
        images.append(image(2, 4))
    logprobs = np.where(sampled, -0.5 - sample, 0.0).astype(np.float32)
    return Trajectory(
        prompt=PROMPT,
        group=group,
        sample=sample,
        token_ids=np.asarray(ids, np.int32),
        sampled=np.asarray(sampled),
        logprobs=logprobs,
        sampled_logprobs=logprobs / 2,
        prompt_length=10,
        images=images,
        prompt_images=1,
        turns=(),
        calls=int(observed),
        stop=StopReason.END_OF_TURN,
    )


def packed(trajectories, shape, count):
    size = max(one.sample for one in trajectories) + 1
    groups = [trajectories[first : first + size] for first in range(0, len(trajectories), size)]
    families = [group_family(group, index * size, CONFIG) for index, group in enumerate(groups)]
    return fill_rows(assign_rows(families, shape), count, shape, CONFIG)


def test_every_sampled_token_is_a_target_once_and_knows_its_rollout():
    trajectories = [trajectory(g, s, 3 + s + g, observed=s == 1) for g in range(3) for s in range(4)]
    rows = packed(trajectories, RowShape(40, 64), 12)
    seen = sorted(zip(rows.rollout[rows.loss_mask], rows.targets[rows.loss_mask], strict=True))
    expected = sorted(
        (4 * one.group + one.sample, token) for one in trajectories for token in one.token_ids[one.sampled]
    )
    assert seen == expected
    np.testing.assert_array_equal(rows.logprobs[rows.loss_mask], -0.5 - rows.rollout[rows.loss_mask] % 4)
    np.testing.assert_array_equal(rows.sampled_logprobs, rows.logprobs / 2)


def test_a_prompt_stands_once_in_a_row_and_its_last_token_in_every_response():
    rows = packed([trajectory(0, sample, 4) for sample in range(3)], RowShape(40, 64), 1)
    used = int((rows.segment_ids[0] > 0).sum())
    # 9 + 3 x (1 + 3) inputs: prompt without its last token, then that token and the response without its last.
    assert used == 21
    assert (rows.token_ids[0, :used] == 14).sum() == 3
    assert (rows.token_ids[0, :used] == 11).sum() == 1
    assert rows.prefix_ids[0, :used].tolist() == [1] * 21
    assert rows.segment_ids[0, :used].tolist() == [1] * 9 + [2] * 4 + [3] * 4 + [4] * 4
    assert not rows.loss_mask[0, :9].any()


def images_of(rows):
    assert rows.images is not None
    return rows.images


def test_positions_and_images_are_those_of_the_trajectory_alone():
    one = trajectory(0, 1, 3, observed=True)
    rows = packed([trajectory(0, 0, 5), one], RowShape(64, 64), 1)
    positions, _ = mrope_positions(one.token_ids, [i.grid for i in one.images], CONFIG)
    at = np.flatnonzero(rows.segment_ids[0] == rows.segment_ids[0][rows.rollout[0] == 1][0])
    np.testing.assert_array_equal(rows.positions[0, at], positions[9:-1])
    features = images_of(rows).feature_index[0]
    # The prompt's image has features 0 to 5, the observation's 6 and 7, whichever response it belongs to.
    assert features[features >= 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (features[at] >= 6).sum() == 2
    assert (images_of(rows).segment_ids[0] > 0).sum() == 24 + 8


def test_rows_keep_to_both_budgets():
    trajectories = [trajectory(g, s, 2 + (5 * g + 3 * s) % 7, observed=True) for g in range(4) for s in range(4)]
    shape = RowShape(48, 40)
    rows = packed(trajectories, shape, 16)
    in_use = (rows.segment_ids > 0).any(axis=1)
    assert ((images_of(rows).segment_ids > 0).sum(axis=1)[in_use] <= 40).all()
    # 24 patches a prompt and 8 an observation: two responses fill a row's patches, so 16 take 8 rows, not 4.
    assert in_use.sum() == 8
    # In micro-batches of three rows three are computed, with a ninth row in which there is nothing.
    micro = jax.tree.map(lambda leaf: leaf[None, :15].reshape(1, 5, 3, *leaf.shape[1:]), rows)
    assert padding_share(micro, np.array([3])) == pytest.approx(1 - (rows.segment_ids > 0).sum() / (9 * 48))


def test_a_segment_stands_together_and_a_family_too():
    """What attention kernels count on: a query sees two stretches of its row."""
    sizes = np.random.default_rng(0).integers(1, 9, (6, 5))
    trajectories = [trajectory(g, s, int(sizes[g, s]), observed=s == 3) for g in range(6) for s in range(5)]
    rows = packed(trajectories, RowShape(64, 100), 12)
    for ids, prefixes in zip(rows.segment_ids, rows.prefix_ids, strict=True):
        used = int((ids > 0).sum())
        for each in (ids, prefixes):
            assert (np.diff(each[:used]) >= 0).all() and not each[used:].any()
        assert len(set(prefixes[:used])) < len(set(ids[:used])) or not used


def test_a_group_larger_than_a_row_repeats_its_prompt():
    rows = packed([trajectory(0, sample, 8) for sample in range(4)], RowShape(28, 64), 4)
    in_use = (rows.segment_ids > 0).any(axis=1)
    assert in_use.sum() == 2
    assert ((rows.token_ids == 11).sum(axis=1)[in_use] == 1).all()


def test_a_response_that_fits_no_row_says_what_to_raise():
    with pytest.raises(PackingError, match="29 tokens and 24 image patches .* raise train.row_tokens"):
        packed([trajectory(0, 0, 20)], RowShape(28, 64), 1)


def test_conversations_learn_what_is_marked():
    ids = np.asarray([5, 6, 7, 8, 9], np.int32)
    family = conversation_family(ids, np.asarray([False, False, True, False, True]), (), CONFIG)
    rows = fill_rows(assign_rows([family], RowShape(8, 0)), 1, RowShape(8, 0), CONFIG)
    assert rows.images is None
    assert rows.targets[rows.loss_mask].tolist() == [7, 9]
    assert rows.token_ids[rows.loss_mask].tolist() == [6, 8]
