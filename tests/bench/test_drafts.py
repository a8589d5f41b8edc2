"""How far drafts reach, on rollouts that are counted by hand."""

import pytest

from tests.bench.drafts import tokens_a_pass


@pytest.mark.parametrize(
    ("prompt", "turns", "pool", "expected"),
    [
        # 1: no 4 was followed. 2 3, and 4 after them: followed the 1 before. 9: after 2 3 4 came 1. Three passes.
        ([1, 2, 3, 4], [[1, 2, 3, 4, 9]], [], 5 / 3),
        # A draft of 2 1 ends with the turn, and brings no token of the next one: 2; then 3 instead of 2.
        ([1, 2, 1], [[2], [1], [3]], [], 2 / 2),
        # Only another rollout knows what follows 1.
        ([1], [[3, 4]], [], 2 / 2),
        ([1], [[3, 4]], [[1, 3]], 2 / 1),
    ],
)
def test_tokens_a_pass(prompt, turns, pool, expected):
    ids, sampled = list(prompt), [False] * len(prompt)
    for number, turn in enumerate(turns):  # sampled, observed, sampled, ...
        ids += turn
        sampled += [number % 2 == 0] * len(turn)
    assert tokens_a_pass([(ids, sampled)], 2, pool) == expected
