import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdpo_jax.algorithm.losses import (
    TokenCounts,
    clipped_surrogate,
    hdpo_loss,
    hdpo_token_loss,
    importance_ratio,
    importance_weights,
)


@pytest.mark.parametrize(
    "advantage, ratio, expected, wrong",
    [
        (1.0, 1.1, -1.1, "inside the clip the surrogate is -A r"),
        (1.0, 1.5, -1.2, "a gain stops at 1 + clip: -1.5 would reward going on"),
        (1.0, 0.5, -0.5, "a loss of probability is not clipped: -0.8 would hide it"),
        (-1.0, 0.5, 0.8, "a gain stops at 1 - clip: 0.5 would reward going on"),
        (-1.0, 1.5, 1.5, "a worsening is not clipped: 1.2 would hide it"),
        (-1.0, 5.0, 3.0, "dual clip: at most 3 |A|; without it 5"),
        (-2.0, 5.0, 6.0, "dual clip scales with |A|: a bare 3 would be wrong"),
        (1.0, 5.0, -1.2, "dual clip is for A < 0 only: -3 would reward going on"),
        (0.0, 5.0, 0.0, "no advantage, no loss"),
    ],
)
def test_clipped_surrogate(advantage, ratio, expected, wrong):
    assert float(clipped_surrogate(jnp.float32(ratio), jnp.float32(advantage))) == pytest.approx(expected), wrong


def test_clip_bounds_are_two():
    bounds = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0}
    assert float(clipped_surrogate(jnp.float32(2.0), jnp.float32(1.0), **bounds)) == pytest.approx(-1.3)
    assert float(clipped_surrogate(jnp.float32(0.5), jnp.float32(-1.0), **bounds)) == pytest.approx(0.9)
    assert float(clipped_surrogate(jnp.float32(9.0), jnp.float32(-1.0), **bounds)) == pytest.approx(2.0)


def test_the_ratio_is_bounded_before_exp():
    found = importance_ratio(jnp.array([0.0, 100.0, -100.0]), jnp.array([0.0, -100.0, 100.0]))
    np.testing.assert_allclose(found, np.exp([0.0, 20.0, -20.0]), rtol=1e-5)  # unbounded: inf and a NaN in 0 * inf


loss_of = jax.jit(hdpo_loss, static_argnames=("w_acc", "w_tool", "clip_low", "clip_high"))
part_of = jax.jit(hdpo_token_loss)


# Two rollouts of 4 and 1 sampled tokens, of a third only the prompt. Log-probs as they were, but for one token.
LOGP = jnp.log(jnp.array([[0.5, 0.5, 0.5, 0.75], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]))
OLD = jnp.log(jnp.full((3, 4), 0.5))
MASK = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
ACC, TOOL = jnp.array([1.0, -2.0, 9.0]), jnp.array([0.5, 0.0, 9.0])


def test_terms_are_token_means():
    loss, metrics = loss_of(LOGP, OLD, ACC, TOOL, MASK)
    # acc: (-1 * 3 - 1.2 + 2) / 5 tokens = -0.44. Mean of rollout means would be (-1.05 + 2) / 2 = 0.475;
    # over all 12 tokens -0.183.
    assert float(metrics["loss/acc"]) == pytest.approx(-0.44)
    # tool: -0.5 (1 + 1 + 1 + 1.2) / 4 tokens of rollout 0 = -0.525; over all 5 sampled tokens it would be -0.42.
    assert float(metrics["loss/tool"]) == pytest.approx(-0.525)
    assert float(loss) == pytest.approx(-0.44 + 0.15 * -0.525)
    assert float(metrics["loss/total"]) == float(loss)
    assert float(metrics["policy/ratio_mean"]) == pytest.approx((4 + 1.5) / 5)
    assert float(metrics["policy/clip_share"]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "tool_rollouts, expected",
    [(None, -0.525), ([True, False, False], -0.525), ([True, True, False], -0.42), ([False, False, False], 0.0)],
)
def test_whose_tokens_the_tool_term_averages(tool_rollouts, expected):
    rollouts = None if tool_rollouts is None else jnp.array(tool_rollouts)
    _, metrics = loss_of(LOGP, OLD, ACC, TOOL, MASK, tool_rollouts=rollouts)
    assert float(metrics["loss/tool"]) == pytest.approx(expected)


def test_weights_and_clips_are_passed_on():
    loss, _ = loss_of(LOGP, OLD, ACC, TOOL, MASK, w_acc=2.0, w_tool=0.0, clip_high=0.1)
    assert float(loss) == pytest.approx(2 * (-3 - 1.1 + 2) / 5)


def test_parts_of_a_mini_batch_add_up():
    """However the tokens fall into parts, they sum to the whole; means of parts would not (2 of 5 tokens: -0.19)."""
    whole, whole_metrics = loss_of(LOGP, OLD, ACC, TOOL, MASK)
    tool_mask = MASK & (TOOL != 0)[:, None]
    counts = TokenCounts(acc=jnp.float32(5), tool=jnp.float32(4))
    parts = [
        part_of(
            LOGP[rows, tokens],
            OLD[rows, tokens],
            ACC[rows, None],
            TOOL[rows, None],
            MASK[rows, tokens],
            tool_mask[rows, tokens],
            counts,
        )
        for rows, tokens in [
            (slice(0, 1), slice(0, 1)),
            (slice(0, 1), slice(1, 4)),
            (slice(1, 3), slice(0, 2)),
            (slice(1, 3), slice(2, 4)),
        ]
    ]
    assert sum(float(loss) for loss, _ in parts) == pytest.approx(float(whole), abs=1e-6)
    for name, value in whole_metrics.items():
        assert sum(float(metrics[name]) for _, metrics in parts) == pytest.approx(float(value), abs=1e-6), name


def test_masked_tokens_may_hold_anything_and_get_no_gradient():
    def loss(logp):
        return loss_of(logp, jnp.where(MASK, OLD, jnp.nan), ACC, TOOL, MASK)[0]

    poisoned = jnp.where(MASK, LOGP, jnp.nan)
    assert float(loss(poisoned)) == pytest.approx(-0.44 + 0.15 * -0.525)
    gradient = np.asarray(jax.jit(jax.grad(loss))(poisoned))
    assert np.all(gradient[~np.asarray(MASK)] == 0.0)
    # d/dlogp of -A r / 5 - 0.15 A_tool r / 4 at r = 1; nothing through the clipped token; 2 / 5 for the second rollout.
    np.testing.assert_allclose(gradient[0], [-0.2 - 0.15 * 0.125] * 3 + [0.0], atol=1e-6)
    np.testing.assert_allclose(gradient[1, 0], 0.4, atol=1e-6)


def test_nothing_sampled_is_no_loss():
    loss, metrics = loss_of(LOGP, OLD, ACC, TOOL, jnp.zeros_like(MASK))
    assert float(loss) == 0.0 and all(np.isfinite(float(value)) for value in metrics.values())


def test_importance_weights_are_trainer_over_sampler_up_to_the_cap():
    trainer, sampler = jnp.log(jnp.array([0.5, 0.3, 0.2, 0.6])), jnp.log(jnp.array([0.5, 0.2, 0.8, 0.1]))
    # The last is 6 without the cap. Sampler over trainer would be [1, 0.667, 2 (of 4), 0.167].
    np.testing.assert_allclose(importance_weights(trainer, sampler, 2.0), [1.0, 1.5, 0.25, 2.0], rtol=1e-6)
    # What can hardly have been sampled is a large weight, not an infinite one.
    np.testing.assert_allclose(importance_weights(jnp.zeros(1), jnp.full(1, -jnp.inf), 1e9), np.exp(20.0), rtol=1e-5)


WEIGHTS = jnp.array([[1.0, 2.0, 0.5, 2.0], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])


def test_both_terms_are_weighted_by_importance():
    loss, metrics = loss_of(LOGP, OLD, ACC, TOOL, MASK, importance=WEIGHTS)
    # acc: (-1 - 2 - 0.5 - 2 * 1.2 + 0.5 * 2) / 5 tokens = -0.98. Divided by the weights' sum -0.817; with the weights
    # inside the clip, as part of the ratio, -0.58.
    assert float(metrics["loss/acc"]) == pytest.approx(-0.98)
    # tool: -0.5 (1 + 2 + 0.5 + 2 * 1.2) / 4 tokens = -0.7375; unweighted -0.525.
    assert float(metrics["loss/tool"]) == pytest.approx(-0.7375)
    assert float(loss) == pytest.approx(-0.98 + 0.15 * -0.7375)
    ones, _ = loss_of(LOGP, OLD, ACC, TOOL, MASK, importance=jnp.ones_like(LOGP))
    assert float(ones) == pytest.approx(-0.44 + 0.15 * -0.525)


def test_importance_is_a_constant():
    """No gradient flows through the weights, though they are made of the log-probs that are learned."""
    sampler = LOGP - jnp.log(1.5)

    def loss(logp, weights_from):
        weights = jnp.where(MASK, importance_weights(weights_from(logp), sampler, 2.0), jnp.nan)
        return loss_of(logp, OLD, ACC, TOOL, MASK, importance=weights)[0]

    gradient = np.asarray(jax.jit(jax.grad(lambda logp: loss(logp, lambda logp: logp)))(LOGP))
    expected = np.asarray(jax.jit(jax.grad(lambda logp: loss(logp, lambda _: LOGP)))(LOGP))
    np.testing.assert_array_equal(gradient, expected)
    # 1.5 times the unweighted gradient; through the weights too it would be 3 times. Nothing from masked NaNs.
    np.testing.assert_allclose(gradient[0], [1.5 * (-0.2 - 0.15 * 0.125)] * 3 + [0.0], atol=1e-6)
    np.testing.assert_allclose(gradient[1], [1.5 * 0.4, 0.0, 0.0, 0.0], atol=1e-6)
