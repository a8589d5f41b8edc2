"""Parameters that two ways of learning the same came to."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def distance(ours: Iterable[Any], theirs: Iterable[Any]) -> float:
    """Euclidean, over all arrays together."""
    pairs = zip(ours, theirs, strict=True)
    return float(np.sqrt(sum(np.square(np.asarray(one, np.float64) - other).sum() for one, other in pairs)))


def assert_learned_the_same(found: Iterable[Any], expected: Iterable[Any], before: Iterable[Any]) -> None:
    """What differs is small beside what was learned, over all parameters together.

    Not one by one: where a gradient is all rounding, Adam's first steps go as far as anywhere else, either way.
    """
    found, expected, before = (list(arrays) for arrays in (found, expected, before))
    moved = distance(expected, before)
    assert moved > 0
    assert distance(found, expected) < 0.002 * moved
