import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdpo_jax.rollout.sampling import _invert, sample, truncate

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
NOTHING = np.zeros(4, bool)


def keys(count: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(count))


def kept(logits: jax.Array) -> list[bool]:
    return np.isfinite(np.asarray(logits[0])).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [True, True, True, True]),
        (2, 1.0, [True, True, False, False]),
        # 0.5 alone is short of 0.6, so the second token stays: "mass up to and including" would drop it.
        (0, 0.6, [True, True, False, False]),
        # The mass before the second token is exactly 0.5: not less than top_p, so it goes.
        (0, 0.5, [True, False, False, False]),
        (0, 1e-9, [True, False, False, False]),
        (3, 0.6, [True, True, False, False]),
    ],
)
def test_truncation(top_k, top_p, expected):
    assert kept(truncate(LOGITS, top_k=top_k, top_p=top_p)) == expected


def test_frequencies_follow_the_temperature():
    rows = 20_000
    tokens, _ = sample(jnp.repeat(LOGITS, rows, axis=0), keys(rows), NOTHING, temperature=0.5)
    shares = np.bincount(np.asarray(tokens), minlength=4) / rows
    # p ** 2 normalised: 0.25, 0.0625, 0.0225, 0.01 over 0.345; a temperature that multiplies gives .37 .26 .20 .17.
    np.testing.assert_allclose(shares, [0.7246, 0.1812, 0.0652, 0.029], atol=0.012)


def test_logprob_is_that_of_the_untruncated_distribution_without_forbidden_tokens():
    forbidden = np.array([False, True, False, False])
    tokens, logprobs = sample(LOGITS, keys(1), forbidden, temperature=1.0, top_k=1)
    assert tokens.tolist() == [0]
    # 0.5 / (0.5 + 0.15 + 0.1); over the truncated distribution it would be 0, with the forbidden token log 0.5.
    np.testing.assert_allclose(logprobs, np.log(0.5 / 0.75), rtol=1e-6)


def test_forbidden_tokens_never_come_up():
    forbidden = np.array([True, False, False, False])
    tokens, _ = sample(jnp.repeat(LOGITS, 2_000, axis=0), keys(2_000), forbidden, temperature=1.0)
    assert 0 not in tokens.tolist()


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    tokens, logprobs = sample(LOGITS, keys(1), NOTHING, temperature=0.0)
    assert tokens.tolist() == [0]
    np.testing.assert_allclose(logprobs, np.log(0.5), rtol=1e-6)


def test_a_row_is_sampled_the_same_in_any_company():
    logits = jax.random.normal(jax.random.key(1), (8, 50))
    forbidden = np.zeros(50, bool)
    together, _ = sample(logits, keys(8), forbidden, temperature=1.0)
    alone = [sample(logits[i : i + 1], keys(8)[i : i + 1], forbidden, temperature=1.0)[0][0] for i in range(8)]
    assert together.tolist() == [int(token) for token in alone]


def test_tokens_without_probability_never_come_up_in_a_real_vocabulary(monkeypatch):
    # A parallel fp32 sum grows by a rounding at tokens that add nothing: draws that fall there are the hard ones.
    logits = jax.random.normal(jax.random.key(5), (8, 151_936)) * 3
    allowed = jax.random.bernoulli(jax.random.key(6), 0.5, logits.shape)
    probabilities = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    cumulative = np.asarray(jnp.cumsum(probabilities, axis=-1))
    grows = (np.diff(cumulative, axis=-1) > 0) & ~np.asarray(allowed)[:, 1:]
    assert grows.sum() > 8
    monkeypatch.setattr(jax.random, "uniform", lambda key: key)
    for row, index in np.argwhere(grows)[:: grows.sum() // 8].tolist():
        draw = 1 - cumulative[row, index + 1] / cumulative[row].max()
        (token,) = _invert(probabilities[row : row + 1], jnp.float32([draw])).tolist()
        assert allowed[row, token]
        assert abs(token - index) < 8  # its neighbour, not just anyone
