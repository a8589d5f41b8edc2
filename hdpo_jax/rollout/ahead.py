"""Off-policy by one: the rollouts of the next step are sampled while this step's update runs.

step         1                     2                          3
sampling     batch 1   batch 2 with p1      batch 3 with p2
learning               batch 1: p1 -> p2    batch 2: p2 -> p3      ...
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from hdpo_jax.config import ConfigError
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.types import Prompt, Trajectory


class Ahead:
    """Each step's rollouts, sampled in a thread during the step before, by the parameters that that one began with.

    Nothing is ahead of the first step of a run, or after a resume: its rollouts are sampled when it asks, on-policy.
    To be closed, also after an error, while the tools are still there.
    """

    def __init__(
        self,
        sampler: Sampler,
        upcoming: Callable[[], Sequence[Prompt]],
        *,
        samples: int,
        steps: int,
        on_finished: Callable[[Trajectory], None] | None = None,
    ):
        """`upcoming` says which prompts come after those of the step; nothing is sampled for steps past `steps`.

        `on_finished` hears of each trajectory as it ends.
        """
        if jax.process_count() > 1:
            # Two threads in each process would start their programs in an order that no other process knows.
            raise ConfigError(f"train.off_policy_steps is 1; expected 0 in a job of {jax.process_count()} processes")
        self._sampler = sampler
        self._upcoming = upcoming
        self._samples = samples
        self._steps = steps
        self._on_finished = on_finished
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._turn = threading.Lock()
        self._under_way: tuple[Rollout, Future[None]] | None = None

    def __call__(self, params: nnx.State, prompts: Sequence[Prompt], number: int) -> Rollout:
        """Step `number`'s rollouts, finished; those of the next are under way, and `params` may be donated.

        Raises what the thread raised.
        """
        if self._under_way is None:
            rollout = self._rollout(prompts, number)
            self._sampler.run(params, rollout)
        else:
            rollout, done = self._under_way
            done.result()
            self._under_way = None
        if number < self._steps:
            self._start(params, number + 1)
        return rollout

    def in_turn(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """`program`, to be started on the devices while the thread may start others there."""

        def started(*arguments: Any) -> Any:
            with self._turn:
                return program(*arguments)

        return started

    def close(self) -> None:
        """Gives up what is under way, and waits until it has ended."""
        if self._under_way is not None:
            rollout, _ = self._under_way
            self._under_way = None
            rollout.cancel()
        self._thread.shutdown()

    def _start(self, params: nnx.State, number: int) -> None:
        own = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), params)
        rollout = self._rollout(self._upcoming(), number)
        self._under_way = rollout, self._thread.submit(self._sampler.run, own, rollout, turn=self._turn)

    def _rollout(self, prompts: Sequence[Prompt], number: int) -> Rollout:
        return self._sampler.rollout(prompts, samples=self._samples, step=number, on_finished=self._on_finished)
