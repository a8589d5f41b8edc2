"""Reward functions of users, by import path: `module:function`, or `file.py:function`.

    # my_rewards.py
    def same_colour(claim):                       # rewards.verifiers rules my_rewards:same_colour
        known = {"red", "green", "blue"}
        if not known.issuperset(claim.truths):
            return None                           # not for this one to say
        return claim.prediction.lower() in claim.truths

    def short_answers(trajectory, verdict):       # rewards.function my_rewards:short_answers
        return verdict._replace(accuracy=verdict.accuracy - 0.1 * (len(trajectory.response_text) > 2_000))

What such a function raises ends the run, in a line that names it; but for VerifierOutage, which says that it could not
be asked, and has the group left out of the update. Functions run in this process, with all its rights; where there is a
judge too, in several threads at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hdpo_jax import import_paths
from hdpo_jax.config import ConfigError
from hdpo_jax.rewards.verdict import Claim, Verdict, Verifier, VerifierOutage
from hdpo_jax.types import Trajectory


class RewardFunctionFailed(RuntimeError):
    """A user's function raised, or returned something else than it should; the message names it."""


def _function(path: str, setting: str) -> Callable[..., Any]:
    """Raises ConfigError, one line that names the setting, where there is none at this path."""
    found = import_paths.load(path, setting)
    if not callable(found):
        raise ConfigError(f"{setting} holds {path!r}, which is {type(found).__name__}; expected a function")
    return found


def custom_verifier(path: str) -> Verifier:
    """A user's `function(claim) -> True, False or None`."""
    function = _function(path, "rewards.verifiers")

    def ask(claim: Claim) -> bool | None:
        found = _called(path, function, claim)
        if found is None or isinstance(found, bool | np.bool_):
            return None if found is None else bool(found)
        raise RewardFunctionFailed(f"{path} returned {found!r}; expected True, False or None")

    return ask


def custom_reward(path: str) -> Callable[[Trajectory, Verdict], Verdict]:
    """A user's `function(trajectory, verdict) -> Verdict`."""
    function = _function(path, "rewards.function")

    def ask(trajectory: Trajectory, verdict: Verdict) -> Verdict:
        found = _called(path, function, trajectory, verdict)
        if not isinstance(found, Verdict):
            raise RewardFunctionFailed(f"{path} returned {found!r}; expected a hdpo_jax.rewards.Verdict")
        if not all(math.isfinite(value) for value in found):
            raise RewardFunctionFailed(f"{path} returned {found!r}; expected finite numbers")
        return found

    return ask


def _called(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except VerifierOutage:
        raise
    except Exception as error:
        raise RewardFunctionFailed(f"{path} raised {type(error).__name__}: {error}") from error
