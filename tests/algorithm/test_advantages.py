import chex
import jax.numpy as jnp
import numpy as np
import pytest

from hdpo_jax.algorithm.advantages import channel_advantages, conditional_group_advantages, group_advantages
from hdpo_jax.config import AlgorithmConfig

HALF = 1 / np.sqrt(2)


def close(found, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected, np.float32), atol=atol)


def test_standardises_each_group_by_its_sample_std():
    # mean 0.5, std (ddof 1) sqrt(1/3) = 0.577: 0.5 / 0.577 = 0.866. With ddof 0 it would be 1.0;
    # over the whole batch (mean 0.625) the first group would not sum to 0.
    found = group_advantages(jnp.array([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]))
    close(found, [[0.866, -0.866, 0.866, -0.866], [0.5, 0.5, 0.5, -1.5]], atol=5e-4)


@pytest.mark.parametrize("size", [2, 3, 7, 11, 16])
def test_equal_rewards_give_exactly_zero(size):
    """In fp32 the mean of equal rewards can miss them by an ulp; over std + 1e-6 that once gave |A| = 0.056."""
    rewards = jnp.tile(jnp.array([0.9, 0.1, 1.0, 1 / 3, 0.7, 0.53, 1 / 11])[:, None], (1, size))
    assert np.all(np.asarray(group_advantages(rewards)) == 0.0)
    assert np.all(np.asarray(conditional_group_advantages(rewards, rewards > 0)) == 0.0)


def test_the_rounding_case_is_real():
    """The formula alone is not zero for these, so the test above tests something."""
    rewards = np.full(11, 0.7, np.float32)
    noise = [
        (rewards[:n] - rewards[:n].sum() / np.float32(n)) / (rewards[:n].std(ddof=1) + np.float32(1e-6))
        for n in range(2, 12)
    ]
    assert max(np.abs(values).max() for values in noise) > 1e-3


def test_one_rollout_has_nothing_to_be_compared_with():
    # The release would use the reward itself, 0.9.
    assert np.asarray(group_advantages(jnp.array([[0.9], [0.1]]))).tolist() == [[0.0], [0.0]]
    # The same where one usable rollout is left of four.
    masked = group_advantages(jnp.array([[0.9, 0.1, 0.1, 1.0]]), jnp.array([[True, False, False, False]]))
    assert np.asarray(masked).tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_dropped_rollouts_count_nowhere():
    rewards = jnp.array([[1.0, 0.0, jnp.nan, 1.0]])
    # Of 1, 0, 1: mean 2/3, std 0.577: 0.577, -1.155. As zeros, the dropped rollout would give mean 0.5 and 0.866.
    found = group_advantages(rewards, jnp.array([[True, True, False, True]]))
    close(found, [[0.57735, -1.15470, 0.0, 0.57735]])
    assert np.asarray(group_advantages(rewards, jnp.zeros((1, 4), bool))).tolist() == [[0.0] * 4]


def test_the_conditional_channel_compares_qualifying_rollouts_only():
    tool = jnp.array([[1.0, 0.5, 0.0, 0.0]])
    correct = jnp.array([[True, True, False, False]])
    # Among the two correct: mean 0.75, std 0.354: +-0.707. Over all four, as in GDPO, the *wrong* rollouts would get
    # -0.783 and even the slower right answer +0.261.
    close(conditional_group_advantages(tool, correct), [[HALF, -HALF, 0.0, 0.0]])
    close(group_advantages(tool), [[1.3056, 0.2611, -0.7833, -0.7833]], atol=5e-4)


@pytest.mark.parametrize("correct", [[True, False, False], [False, False, False]])
def test_fewer_than_two_qualifying_rollouts_give_zero(correct):
    found = conditional_group_advantages(jnp.array([[1.0, 0.0, 0.0]]), jnp.array([correct]))
    assert np.asarray(found).tolist() == [[0.0, 0.0, 0.0]]


def test_a_dropped_rollout_does_not_qualify():
    tool, correct = jnp.array([[1.0, 0.5, 0.5]]), jnp.array([[True, True, True]])
    found = conditional_group_advantages(tool, correct, jnp.array([[True, True, False]]))
    close(found, [[HALF, -HALF, 0.0]])  # with the dropped one: 1.155, -0.577, -0.577


ROLLOUTS = {
    # Group 0: right after 0, 1 and 1 calls, wrong after 3. Group 1: one right, one dropped. Group 2: both right, equal.
    "accuracy_rewards": jnp.array([[1.0, 1.0, 1.0, 0.1], [1.0, 0.1, 0.0, jnp.nan], [1.0, 1.0, 0.1, 0.1]]),
    "tool_rewards": jnp.array([[1.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.0, jnp.nan], [0.5, 0.5, 0.0, 0.0]]),
    "calls": jnp.array([[0.0, 1.0, 1.0, 3.0], [1.0, 0.0, 0.0, jnp.nan], [1.0, 1.0, 0.0, 0.0]]),
    "correct": jnp.array([[True, True, True, False], [True, False, False, False], [True, True, False, False]]),
    "usable": jnp.array([[True] * 4, [True, True, True, False], [True] * 4]),
}


def channels(**settings):
    return channel_advantages(AlgorithmConfig(**settings), **ROLLOUTS)


def test_hdpo_keeps_two_channels():
    found = channels()
    chex.assert_shape(found, (3, 4))
    close(found.acc[0], [0.5, 0.5, 0.5, -1.5], atol=1e-4)
    close(found.tool[0], [1.15470, -0.57735, -0.57735, 0.0])
    assert np.asarray(found.tool[1:]).tolist() == [[0.0] * 4] * 2  # one right answer; two that are equally fast
    assert np.asarray(found.acc[1, 3]) == 0.0


@pytest.mark.parametrize(
    "mean_over, expected",
    [
        ("nonzero", [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ("qualifying", [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]),  # a lone right answer (group 1) is no comparison
        ("all", [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_whose_tokens_the_tool_term_averages(mean_over, expected):
    found = channels(tool_mean_over=mean_over)
    assert np.asarray(found.tool_rollouts).astype(int).tolist() == expected
    assert np.asarray(found.qualifying).astype(int).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]


def test_the_unconditional_baseline_compares_wrong_rollouts_too():
    found = channels(advantages="unconditional")
    close(found.tool[0], group_advantages(ROLLOUTS["tool_rewards"][:1])[0])
    assert float(found.tool[0, 3]) < 0 and float(found.tool[1, 0]) > 0
    close(found.acc, channels().acc)


def test_coupled_baselines_normalise_one_sum():
    # r_acc - 0.1 T of group 0: 1, 0.9, 0.9, -0.2: mean 0.65, std 0.5686. Normalised apart, then added: other.
    found = channels(advantages="coupled_calls", coupling=0.1)
    close(found.acc[0], np.array([0.35, 0.25, 0.25, -0.85]) / 0.568624, atol=1e-4)
    # r_acc + 0.1 r_tool: 1.1, 1.05, 1.05, 0.1: mean 0.825, std 0.484.
    rewarded = channels(advantages="coupled_reward", coupling=0.1)
    close(rewarded.acc[0], np.array([0.275, 0.225, 0.225, -0.725]) / 0.483908, atol=1e-4)
    for one_channel in (found, rewarded):
        assert not np.asarray(one_channel.tool).any() and not np.asarray(one_channel.qualifying).any()
        assert np.isfinite(np.asarray(one_channel.acc)).all()
