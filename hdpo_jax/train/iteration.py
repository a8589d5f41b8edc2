"""One iteration of HDPO: prompts in, a learned state out; driven by the host, or as one program."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from hdpo_jax.algorithm.state import TrainState, abstract_state, state_shardings
from hdpo_jax.algorithm.update import UpdateBatch, make_update
from hdpo_jax.config import RLConfig
from hdpo_jax.rewards import Verdict
from hdpo_jax.rewards.scorer import Scorer
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.ahead import Ahead
from hdpo_jax.rollout.fused import IterationFailed, make_iterate
from hdpo_jax.rollout.lockstep import in_order
from hdpo_jax.rollout.packing import group_family, padding_share
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.rollout.stats import RolloutStats
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.policy import Policy
from hdpo_jax.train.scoring import learnable, outage_metrics
from hdpo_jax.types import Prompt, Trajectory
from sharding.multihost import agree, together
from sharding.rules import shard_batch


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What came of a step: trajectories, verdicts and stats are this process's, the rest is of all processes."""

    state: TrainState
    trajectories: Sequence[Trajectory]
    verdicts: Sequence[Verdict | None]
    """None: the answer could not be judged."""
    stats: RolloutStats
    metrics: Mapping[str, Any]


Iterate = Callable[[TrainState, Sequence[Prompt], int], Iteration]
"""`iterate(state, this process's prompts, step number)`; the old state's buffers are donated."""


def make_iteration(
    config: RLConfig,
    policy: Policy,
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    numbers: Sequence[int],
    scorer: Scorer,
    ahead: Ahead | None = None,
) -> Iterate:
    """The iteration that `config.rollout.mode` names; both give the same trajectories and the same states.

    `numbers`: which of a step's prompts are this process's (`Batches.places`). With `ahead` (host-driven only) the
    update runs while that samples; without, the two take turns. Where more answers can not be judged than the config
    allows, the iteration raises VerifierOutage in every process.
    """
    shardings = state_shardings(abstract_state(policy.params, optimizer))
    update = make_update(
        policy.graphdef,
        optimizer,
        config.algorithm,
        temperature=config.rollout.temperature,
        forbidden=policy.processor.forbidden,
        shardings=shardings,
    )
    fixed = config.rollout.mode == "fused"
    pack = RowBatcher.of(config, policy.model.config, policy.model.dtype)
    samples, mini_batches = config.train.group_size, config.train.mini_batches
    rollouts = config.train.prompts_per_step * samples

    def on_policy(params: nnx.State, prompts: Sequence[Prompt], number: int) -> Rollout:
        rollout = sampler.rollout(prompts, samples=samples, step=number, numbers=numbers, on_finished=scorer.begin)
        sampler.run(params, rollout)
        return rollout

    collect, learn = (ahead, ahead.in_turn(update)) if ahead else (on_policy, update)

    def host_driven(state: TrainState, prompts: Sequence[Prompt], number: int) -> Iteration:
        started = time.perf_counter()
        rollout = collect(state.params, prompts, number)
        trajectories = rollout.trajectories
        sampled = time.perf_counter()
        with together():
            verdicts = scorer.verdicts(trajectories, of=rollouts)
        outages = outage_metrics(scorer, trajectories, verdicts, step=number, of=rollouts)
        scored = time.perf_counter()
        batch = joined(assemble(trajectories, verdicts, pack, mini_batches))
        rows = shard_batch(batch.rows, policy.mesh, axis=2)
        packed = time.perf_counter()
        state, metrics = learn(state, batch._replace(rows=rows))
        metrics = jax.device_get(dict(metrics))
        times = {
            "time/rollout": sampled - started,
            "time/score": scored - sampled,
            "time/pack": packed - scored,
            "time/update": time.perf_counter() - packed,
        }
        metrics |= {"rows/padding": _padding(batch), **outages, **times}
        return Iteration(
            state=state, trajectories=trajectories, verdicts=verdicts, stats=rollout.stats, metrics=metrics
        )

    if not fixed:
        return _warmed_up(host_driven, sampler)

    judged: dict[str, Any] = {}

    def judge_within(trajectories: Sequence[Trajectory]) -> UpdateBatch:
        judged["verdicts"] = scorer.verdicts(trajectories, of=rollouts)
        batch = assemble(trajectories, judged["verdicts"], pack, mini_batches)
        judged["batch"] = batch
        return batch

    program = make_iterate(
        sampler.programs,
        update,
        judge_within,
        mesh=policy.mesh,
        nothing=sampler.empty_round,
        no_batch=empty_batch(pack, mini_batches, len(numbers), samples),
        shardings=shardings,
    )

    def fused(state: TrainState, prompts: Sequence[Prompt], number: int) -> Iteration:
        rollout = sampler.rollout(prompts, samples=samples, step=number, numbers=numbers, on_finished=scorer.begin)
        try:
            state, metrics = program(state, rollout)
        except IterationFailed as failed:
            raise failed.__cause__ or failed from None
        finally:
            rollout.close()
        sampler.remember(rollout)
        verdicts = judged.pop("verdicts")
        outages = outage_metrics(scorer, rollout.trajectories, verdicts, step=number, of=rollouts)
        metrics = jax.device_get(dict(metrics)) | {"rows/padding": _padding(judged.pop("batch")), **outages}
        return Iteration(
            state=state,
            trajectories=rollout.trajectories,
            verdicts=verdicts,
            stats=rollout.stats,
            metrics=metrics,
        )

    return fused


def _warmed_up(iterate: Iterate, sampler: Sampler) -> Iterate:
    """Compiles the rollout's programs, all of them, before the first step."""
    warm = False

    def with_warm_up(state: TrainState, prompts: Sequence[Prompt], number: int) -> Iteration:
        nonlocal warm
        if not warm:
            sampler.warm_up(state.params)
            warm = True
        return iterate(state, prompts, number)

    return with_warm_up


def assemble(
    trajectories: Sequence[Trajectory], verdicts: Sequence[Verdict | None], pack: RowBatcher, mini_batches: int
) -> UpdateBatch:
    """The update's input, of this process's rollouts.

    `trajectories` come in the order of groups and samples, every group whole, equally many of each mini-batch. Dropped
    rollouts, and groups of which some could not be judged, keep their place and are masked.
    """
    groups = len({trajectory.group for trajectory in trajectories})
    size = len(trajectories) // groups
    families = [
        group_family(trajectories[first : first + size], trajectories[first].group * size, pack.model)
        for first in range(0, len(trajectories), size)
    ]
    each = groups // mini_batches
    micro_batches: Any
    rows, micro_batches = pack([families[first : first + each] for first in range(0, groups, each)])

    # Of what is masked no reward is read.
    rewards = [verdict or Verdict(0.0, 0.0, 0.0, 0.0, False) for verdict in verdicts]

    def per_rollout(values: Sequence[float | bool], dtype: type) -> Any:
        return np.asarray(values, dtype).reshape(groups, size)

    return UpdateBatch(
        rows=rows,
        micro_batches=micro_batches,
        accuracy_rewards=per_rollout([verdict.accuracy for verdict in rewards], np.float32),
        tool_rewards=per_rollout([verdict.tool for verdict in rewards], np.float32),
        calls=per_rollout([trajectory.calls for trajectory in trajectories], np.float32),
        correct=per_rollout([verdict.correct for verdict in rewards], np.bool_),
        usable=per_rollout(learnable(trajectories, verdicts), np.bool_),
    )


def joined(batch: UpdateBatch) -> UpdateBatch:
    """With the rewards, calls and flags of all processes' rollouts; the rows are still this one's."""
    rows, micro_batches, *values = batch
    everyone: list[Any] = [agree(np.asarray(each)) for each in values]
    return UpdateBatch(rows, micro_batches, *(in_order(each, len(micro_batches)) for each in everyone))


def _padding(batch: UpdateBatch) -> float:
    share = padding_share(batch.rows, np.asarray(batch.micro_batches))
    return float(agree(np.asarray(share)).mean())


def empty_batch(pack: RowBatcher, mini_batches: int, prompts: int, samples: int) -> UpdateBatch:
    """A batch without a rollout, with the shapes and types of those that `assemble` makes."""
    rows, micro_batches = pack([[] for _ in range(mini_batches)])
    numbers, flags = np.zeros((prompts, samples), np.float32), np.zeros((prompts, samples), np.bool_)
    arrays: list[Any] = [rows, micro_batches, numbers, numbers, numbers, flags, flags]
    return UpdateBatch(*arrays)
