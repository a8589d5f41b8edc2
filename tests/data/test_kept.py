"""What is kept between epochs stays within its budget."""

import pickle

import numpy as np

from hdpo_jax.data.kept import Kept


def test_values_are_made_once_while_they_fit():
    kept: Kept[np.ndarray] = Kept(1)
    made = []

    def get(id: str, size: int) -> np.ndarray:
        return kept.get(id, lambda: made.append(id) or np.zeros(size, np.uint8))

    for _ in range(2):
        get("a", 600_000)
        get("too large", 600_000)
        get("b", 300_000)
    assert made == ["a", "too large", "b", "too large"]
    assert get("a", 1) is get("a", 1)


def test_a_copy_for_another_process_keeps_nothing():
    kept: Kept[np.ndarray] = Kept(1)
    kept.get("a", lambda: np.zeros(500_000, np.uint8))
    copy = pickle.dumps(kept)
    assert len(copy) < 200
    other = pickle.loads(copy)
    assert len(other.get("a", lambda: np.zeros(7))) == 7
    assert len(other.get("a", lambda: np.zeros(8))) == 8
