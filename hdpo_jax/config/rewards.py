"""Who says whether an answer is right, and what that is worth."""

from dataclasses import dataclass, field

from hdpo_jax.config.checks import at_least, more_than_zero, require, share


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A language model behind an OpenAI-compatible endpoint; its key, if any, comes from HDPO_JUDGE_API_KEY.

    In use with `--rewards.verifiers rules judge --rewards.judge.url http://10.0.0.7:8000/v1 --rewards.judge.model M`.
    """

    url: str = ""
    """As in http://10.0.0.7:8000/v1."""
    model: str = ""
    timeout_seconds: float = 30.0
    """Of one attempt."""
    attempts: int = 4
    """With a pause before each but the first that doubles, and is drawn at random below that."""
    concurrency: int = 32
    """Questions that are under way at a time."""
    cache: str = ""
    """A folder for verdicts, by content; failures are never kept. Empty: they are kept in memory only."""
    max_chars: int = 2_000
    """Of a prediction; what is longer is cut, and the judge is told so."""
    max_tokens: int = 2_048
    """Of a reply: one word, behind what a reasoning model thinks first."""
    double_check: float = 0.0
    """Share of answers about which the judge is asked once more, in other words. Where the two disagree, which is a
    metric, a third wording decides."""
    max_outage: float = 0.2
    """Share of a step's rollouts (of an evaluation's) past which a run stops, because the judge could not be asked.
    Below it, the groups of such rollouts are left out of the update."""

    def __post_init__(self):
        more_than_zero(self, "rewards.judge", "timeout_seconds")
        at_least(self, "rewards.judge", 1, "attempts", "concurrency", "max_chars", "max_tokens")
        share(self, "rewards.judge", "double_check", "max_outage")


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    verifiers: tuple[str, ...] = ("rules",)
    """Asked in this order until one can tell: rules, judge, or a function of yours as module:function, which is given
    a `hdpo_jax.rewards.Claim` and returns True (right), False (wrong) or None (can not tell)."""
    function: str = ""
    """A function of yours, as module:function, that is given a trajectory and its verdict and returns the verdict that
    counts. Empty: r_acc = 0.9 answer + 0.1 format."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        asked = "judge" in self.verifiers
        web = self.judge.url.startswith(("http://", "https://"))
        require(len(self.verifiers) > 0, "rewards.verifiers", self.verifiers, "at least one")
        require(
            not asked or web,
            "rewards.judge.url",
            self.judge.url,
            "an address such as http://10.0.0.7:8000/v1, for rewards.verifiers has judge",
        )
        require(not asked or self.judge.model != "", "rewards.judge.model", "", "a model's name")
