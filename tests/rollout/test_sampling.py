import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdpo_jax.rollout.sampling import OwnSampling, _draw, sample, sample_own, truncate

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
NOTHING = np.zeros(4, bool)


def keys(count: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.arange(count))


def kept(logits: jax.Array) -> list[bool]:
    return np.isfinite(np.asarray(logits[0])).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 0, "top_p": 1.0}, [True, True, True, True]),
        ({"top_k": 2, "top_p": 1.0}, [True, True, False, False]),
        # 0.5 alone is short of 0.6, so the second token stays: "mass up to and including" would drop it.
        ({"top_k": 0, "top_p": 0.6}, [True, True, False, False]),
        # The mass before the second token is exactly 0.5: not less than top_p, so it goes.
        ({"top_k": 0, "top_p": 0.5}, [True, False, False, False]),
        ({"top_k": 0, "top_p": 1e-9}, [True, False, False, False]),
        ({"top_k": 3, "top_p": 0.6}, [True, True, False, False]),
        (
            {"min_p": 0.4},
            [True, True, False, False],
        ),  # at least 0.4 of 0.5: as a probability, 0.4 would leave the first
        ({"min_p": 0.25}, [True, True, True, False]),
    ],
)
def test_truncation(settings, expected):
    assert kept(truncate(LOGITS, **settings)) == expected


def test_frequencies_follow_the_temperature():
    rows = 20_000
    tokens, *_ = sample(jnp.repeat(LOGITS, rows, axis=0), keys(rows), NOTHING, temperature=0.5)
    shares = np.bincount(np.asarray(tokens), minlength=4) / rows
    # p ** 2 normalised: 0.25, 0.0625, 0.0225, 0.01 over 0.345; a temperature that multiplies gives .37 .26 .20 .17.
    np.testing.assert_allclose(shares, [0.7246, 0.1812, 0.0652, 0.029], atol=0.012)


def test_both_log_probabilities_leave_forbidden_tokens_out_and_one_what_is_truncated():
    forbidden = np.array([False, True, False, False])
    tokens, policy, sampled = sample(LOGITS, keys(1), forbidden, temperature=1.0, top_k=2)
    probability = {0: 0.5, 2: 0.15}[int(tokens[0])]
    np.testing.assert_allclose(policy, np.log(probability / 0.75), rtol=1e-6)
    np.testing.assert_allclose(sampled, np.log(probability / 0.65), rtol=1e-6)


def test_forbidden_tokens_never_come_up():
    forbidden = np.array([True, False, False, False])
    tokens, *_ = sample(jnp.repeat(LOGITS, 2_000, axis=0), keys(2_000), forbidden, temperature=1.0)
    assert 0 not in tokens.tolist()


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    tokens, policy, sampled = sample(LOGITS, keys(1), NOTHING, temperature=0.0)
    assert tokens.tolist() == [0]
    np.testing.assert_allclose(policy, np.log(0.5), rtol=1e-6)
    assert sampled.tolist() == [0]


def test_a_row_is_sampled_the_same_in_any_company():
    logits = jax.random.normal(jax.random.key(1), (8, 50))
    forbidden = np.zeros(50, bool)
    together, *_ = sample(logits, keys(8), forbidden, temperature=1.0)
    alone = [sample(logits[i : i + 1], keys(8)[i : i + 1], forbidden, temperature=1.0)[0][0] for i in range(8)]
    assert together.tolist() == [int(token) for token in alone]


def test_a_large_vocabulary_is_sampled_by_its_probabilities():
    """Tokens are looked for block by block: shares over blocks, and within one, are those of the softmax."""
    rows, vocab = 40_000, 300
    logits = jax.random.normal(jax.random.key(2), (vocab,)) * 2
    tokens, *_ = sample(jnp.broadcast_to(logits, (rows, vocab)), keys(rows), np.zeros(vocab, bool), temperature=1.0)
    shares = np.bincount(np.asarray(tokens), minlength=vocab) / rows
    expected = np.asarray(jax.nn.softmax(logits))
    # Four standard deviations of a count, and one token.
    np.testing.assert_array_less(np.abs(shares - expected), 4 * np.sqrt(expected / rows) + 1 / rows)


def test_tokens_without_probability_never_come_up_in_a_real_vocabulary(monkeypatch):
    # A parallel fp32 sum grows by a rounding at tokens that add nothing: draws that fall there are the hard ones.
    vocab = 151_936
    logits = jax.random.normal(jax.random.key(5), (vocab,)) * 3
    allowed = np.array(jax.random.bernoulli(jax.random.key(6), 0.5, (vocab,)))
    allowed[:1_000] = allowed[-1_000:] = False  # whole blocks at both ends
    logits = jnp.where(allowed, logits, -jnp.inf)
    cumulative = np.cumsum(np.asarray(jax.nn.softmax(logits)), dtype=np.float64)
    places = np.flatnonzero(~allowed)[:: (~allowed).sum() // 200]
    draws = np.concatenate([[0.0, 1 - 2.0**-24], np.clip(1 - cumulative[places], 0, 1 - 2.0**-24)]).astype(np.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda key: key)
    tokens = np.asarray(_draw(jnp.broadcast_to(logits, (len(draws), vocab)), jnp.asarray(draws)))
    assert allowed[tokens].all()
    drawn = 1 - draws
    assert (cumulative[tokens] > drawn - 1e-5).all() and (cumulative[tokens - 1] < drawn + 1e-5).all()


def test_rows_that_say_how_they_are_sampled_are_sampled_as_if_all_were():
    ways = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
    ]
    rows, vocabulary = len(ways), 50
    logits = 2 * jax.random.normal(jax.random.key(1), (rows, vocabulary))
    forbidden = jnp.arange(vocabulary) % 7 == 0
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    own = OwnSampling(*(jnp.asarray([way.get(name, default) for way in ways]) for name, default in fields.items()))
    for draw in range(20):
        drawn = jax.random.split(jax.random.key(draw), rows)
        found = sample_own(logits, drawn, forbidden, own)
        for row, way in enumerate(ways):
            expected = sample(logits, drawn, forbidden, **way)
            assert int(found[0][row]) == int(expected[0][row])
            for one, other in zip(found[1:], expected[1:], strict=True):
                np.testing.assert_allclose(one[row], other[row], atol=1e-5)
