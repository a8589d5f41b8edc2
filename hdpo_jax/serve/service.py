"""One engine for many who ask at a time: a thread that samples, and a queue that requests wait in.

Requests join while others are under way (continuous batching). Each says how it is sampled, and what comes of it
depends on its own words, seed and settings alone, not on who else is asking.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from hdpo_jax.config import AgentConfig, RolloutConfig
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.prompts import PromptEncoder, Question
from hdpo_jax.rollout.sources import Member, Opening
from hdpo_jax.tools.protocol import Tools
from hdpo_jax.train.policy import Policy
from hdpo_jax.types import Prompt, Trajectory

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """As many requests are waiting as may."""


class Closed(RuntimeError):
    """The engine has ended, or is about to: it takes no more requests."""


class Requests:
    """A rollout's source: what was asked and is not under way yet. Any thread may put, one takes."""

    def __init__(self, most: int):
        self._most = most
        self._waiting: deque[Opening] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, opening: Opening) -> None:
        """Raises Busy, or Closed."""
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._waiting) >= self._most:
                self._waiting = deque(opening for opening in self._waiting if not _gone(opening))
            if len(self._waiting) >= self._most:
                raise Busy(f"{self._most} requests are waiting already")
            self._waiting.append(opening)
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting)

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._closed and not self._waiting

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)

    def pop(self) -> Opening | None:
        with self._changed:
            opening = self._waiting.popleft()
        return None if _gone(opening) else opening

    def finished(self, trajectory: Trajectory) -> None:
        """Whoever asked has heard of it from their listener."""

    @property
    def trajectories(self) -> list[Trajectory]:
        return []

    def close(self) -> None:
        """Nothing is taken any more; what waits is still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _gone(opening: Opening) -> bool:
    """Whether nobody waits for it any more."""
    return all(member.listener and member.listener.gone for member in opening.members)


class Service:
    """A policy that answers. To be started, and stopped."""

    def __init__(
        self,
        policy: Policy,
        toolbox: Tools | None,
        *,
        agent: AgentConfig,
        rollout: RolloutConfig,
        seed: int = 0,
        waiting: int = 256,
    ):
        """`waiting`: requests that may wait, at most."""
        self.policy = policy
        self.encode = PromptEncoder(policy.processor, rollout)
        self.agent = agent
        self.rollout = rollout
        self._sampler = policy.sampler(toolbox, agent=agent, rollout=rollout, seed=seed, encode=self.encode, own=True)
        self._requests = Requests(waiting)
        self._rollout: Rollout = self._sampler.rollout_of(self._requests, alone=False)
        self.error: BaseException | None = None
        """What ended the engine, where nobody asked it to."""
        self._stopped = False
        self._watchers: dict[Callable[[], None], None] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compiles every program, then begins to answer."""
        self._sampler.warm_up(self.policy.params)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that are not under way yet."""
        return len(self._requests)

    @property
    def running(self) -> int:
        """Answers that are under way."""
        return self._rollout.under_way

    def question(self, prompt: Prompt) -> Question:
        """The prompt as the model gets it. Raises ValueError, one line, where it can not be asked."""
        return self.encode(prompt)

    def ask(self, question: Question, members: Sequence[Member]) -> None:
        """Has trajectories sampled that go on from a question; their listeners hear of them. Raises Busy or Closed."""
        self._requests.put(Opening(question, 0, members))

    def watch(self, ended: Callable[[], None]) -> None:
        """Has `ended` called, in the engine's thread, when the engine ends."""
        self._watchers[ended] = None

    def unwatch(self, ended: Callable[[], None]) -> None:
        self._watchers.pop(ended, None)

    def stop(self, seconds: float) -> None:
        """Answers what was asked, for so long at most; then whatever is left is given up."""
        self._stopped = True
        self._requests.close()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._rollout.cancel()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._sampler.run(self.policy.params, self._rollout)
            if not self._stopped:
                raise RuntimeError("the engine ended before it was told to")
        except CancelledError:
            pass
        except BaseException as error:
            log.exception("the engine failed")
            self.error = error
        finally:
            self._requests.close()
            for ended in list(self._watchers):
                ended()
