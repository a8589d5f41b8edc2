"""The confidence gate: at inference, a tool call that is hardly worth it is not sent, and the turn is answered instead.

No part of HDPO: a policy that HDPO has trained decides by itself. This is a dial for whoever runs one. The policy's
own probability of beginning a call, `p`, becomes the share of calls of such a `p` that turned a wrong answer into a
right one, as found on held-out prompts (`hdpo eval --calibrate-gate`); a call is sent where that reaches a threshold.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from hdpo_jax.config import AgentConfig, ConfigError
from hdpo_jax.files import write_text_atomically


@dataclass(frozen=True, kw_only=True)
class Gate:
    """`worth` of a call by its `p`: not decreasing, linear between the points, level outside of them."""

    probabilities: tuple[float, ...]
    worths: tuple[float, ...]
    threshold: float

    def sends(self, probability: float) -> bool:
        return self.worth(probability) >= self.threshold

    def worth(self, probability: float) -> float:
        """Share of calls of this probability that turned a wrong answer into a right one."""
        return float(np.interp(probability, self.probabilities, self.worths))

    @classmethod
    def closed(cls) -> "Gate":
        """Sends nothing."""
        return cls(probabilities=(0.0,), worths=(0.0,), threshold=1.0)

    @classmethod
    def of(cls, agent: AgentConfig) -> "Gate | None":
        """The one that the settings name; None: every call is sent. Raises ConfigError where its file is none."""
        if not agent.gate:
            return None
        try:
            stored = json.loads(Path(agent.gate).read_text(encoding="utf-8"))
            points = [(float(p), float(worth)) for p, worth in zip(stored["p"], stored["worth"], strict=True)]
            probabilities, worths = zip(*points, strict=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise ConfigError(
                f"agent.gate is {agent.gate!r}, which can not be read ({reason}); expected the gate.json of "
                "hdpo eval --calibrate-gate"
            ) from None
        return cls(probabilities=probabilities, worths=worths, threshold=agent.gate_threshold)

    @classmethod
    def fit(cls, probabilities: Sequence[float], worthwhile: Sequence[bool], threshold: float = 0.5) -> "Gate":
        """The not decreasing function of `p` that is closest to whether calls were worthwhile, in squares.

        Isotonic regression by pooling adjacent violators.
        """
        order = np.argsort(probabilities, kind="stable")
        p, worth = np.asarray(probabilities, float)[order], np.asarray(worthwhile, float)[order]
        blocks: list[tuple[float, int, int]] = []  # sum, first, end
        for place, value in enumerate(worth):
            total, first = float(value), place
            while blocks and blocks[-1][0] * (place + 1 - first) >= total * (blocks[-1][2] - blocks[-1][1]):
                before, first, _ = blocks.pop()
                total += before
            blocks.append((total, first, place + 1))
        level = [(p[first], p[end - 1], total / (end - first)) for total, first, end in blocks]
        points = dict([(float(p), mean) for low, high, mean in level for p in (low, high)])
        return cls(probabilities=tuple(points), worths=tuple(points.values()), threshold=threshold)

    def save(self, path: Path) -> None:
        record = {"p": self.probabilities, "worth": self.worths}
        write_text_atomically(path, json.dumps(record, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Trajectories sampled twice with the same randomness: with their calls, and with answers in place of them."""

    probability: Float[np.ndarray, " rollouts"]
    """Of the first call; NaN where there was none."""
    called: Bool[np.ndarray, " rollouts"]
    right: Bool[np.ndarray, " rollouts"]
    """With the calls."""
    right_without: Bool[np.ndarray, " rollouts"]

    def gate(self) -> Gate:
        """Fitted to those that called. Raises ConfigError where none did."""
        if not self.called.any():
            raise ConfigError("none of these rollouts calls a tool; expected some, to calibrate a gate for calls")
        worthwhile = self.right & ~self.right_without
        return Gate.fit(self.probability[self.called].tolist(), worthwhile[self.called].tolist())

    def curve(self, gate: Gate) -> list[tuple[float, float, float]]:
        """(threshold, tool rate, accuracy) at every threshold that makes a difference to first calls."""
        worths = np.asarray([gate.worth(p) if called else -1.0 for p, called in self._pairs()])
        thresholds = [0.0, *sorted(set(worths[self.called].tolist())), 1.0 + 1e-9]
        points = []
        for threshold in dict.fromkeys(thresholds):
            sent = self.called & (worths >= threshold)
            points.append((float(threshold), float(sent.mean()), float(np.where(sent, self.right, self.unsent).mean())))
        return points

    @property
    def unsent(self) -> Bool[np.ndarray, " rollouts"]:
        """Whether the answer is right where no call is sent."""
        return np.where(self.called, self.right_without, self.right)

    def _pairs(self) -> list[tuple[float, bool]]:
        return list(zip(self.probability.tolist(), self.called.tolist(), strict=True))
