"""The verdicts of a run's trajectories, as `rewards.*` says; a judge is asked while others are still sampled."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hdpo_jax.config import JudgeConfig, RewardsConfig
from hdpo_jax.rewards.custom import custom_reward, custom_verifier
from hdpo_jax.rewards.verdict import Verdict, Verifier, VerifierOutage, by_rules, score_trajectory
from hdpo_jax.types import Trajectory

if TYPE_CHECKING:
    from hdpo_jax.rewards.judge import Judge


class Scorer:
    """Scores trajectories. Without a judge it does so at once, in the thread that asks for it; with one in threads.

    A context manager: what is under way when it closes is given up.
    """

    def __init__(self, config: RewardsConfig):
        """Raises ConfigError where a function that the config names is not there."""
        self._config = config
        self._function = custom_reward(config.function) if config.function else None
        own = {name: custom_verifier(name) for name in config.verifiers if name not in ("rules", "judge")}
        known: dict[str, Verifier] = {"rules": by_rules, **own}
        self.judge: Judge | None = None
        self._pool: ThreadPoolExecutor | None = None
        if "judge" in config.verifiers:
            known["judge"] = self.judge = _opened(config.judge)
            # Those that wait for the judge, and as many for whom rules are at work, or another's question is.
            self._pool = ThreadPoolExecutor(2 * config.judge.concurrency, thread_name_prefix="score")
        self._verifiers = [known[name] for name in config.verifiers]
        self._begun: dict[int, tuple[Trajectory, Future[Verdict | None]]] = {}
        self.said = ""
        """By the last verifier that could not be asked."""

    @property
    def is_embedded(self) -> bool:
        """Nothing is asked that may be out of reach."""
        return set(self._config.verifiers) == {"rules"} and self._function is None

    def begin(self, trajectory: Trajectory) -> None:
        """Has a finished trajectory scored while others are sampled; without a judge it is left to `verdicts`."""
        if self._pool is not None:
            self._begun[id(trajectory)] = trajectory, self._pool.submit(self._score, trajectory)

    def verdicts(self, trajectories: Sequence[Trajectory], *, of: int) -> list[Verdict | None]:
        """One for each trajectory; None where a verifier that was to say could not be asked.

        Raises VerifierOutage as soon as they are more than the config allows `of` so many rollouts.
        """
        if self._pool is None:
            found, lost = [], 0
            for trajectory in trajectories:
                found.append(self._score(trajectory))
                lost += found[-1] is None
                self.check(lost, of=of)
            return found
        for trajectory in trajectories:
            if id(trajectory) not in self._begun:
                self.begin(trajectory)
        futures = [self._begun.pop(id(trajectory))[1] for trajectory in trajectories]
        lost = 0
        try:
            for future in as_completed(futures):
                lost += future.result() is None
                self.check(lost, of=of)
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def check(self, lost: int, *, of: int) -> None:
        """Raises VerifierOutage where more answers than the config allows could not be judged."""
        allowed = self._config.judge.max_outage
        if lost > allowed * of + 1e-6:  # 0.29 of 100 is 28.999999999999996
            raise VerifierOutage(
                f"{lost} of {of} answers could not be judged, and rewards.judge.max_outage is {allowed:g}: {self.said}"
            )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self.judge is not None:
            self.judge.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score(self, trajectory: Trajectory) -> Verdict | None:
        # What the world broke off is not learned from: nobody needs to be asked.
        try:
            if not trajectory.usable:
                return score_trajectory(trajectory, ())
            verdict = score_trajectory(trajectory, self._verifiers)
            return self._function(trajectory, verdict) if self._function else verdict
        except VerifierOutage as outage:
            self.said = str(outage)
            return None


def _opened(config: JudgeConfig) -> "Judge":
    # The client takes its time to import, and rules need none.
    from hdpo_jax.rewards.judge import Judge

    return Judge(config)
