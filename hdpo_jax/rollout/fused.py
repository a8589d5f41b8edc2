"""One iteration as one XLA program: sampling, tools, rewards, advantages, losses, and the optimizer's step.

The programs of a host-driven rollout, in a loop on the device that asks the host, between chunks, what to run next:

    until the host says that every trajectory has ended:
        orders = io_callback(what was sampled)       tools run, observations come back
        extend, copy, decode                         as ordered
    batch = io_callback()                            rewards, and the rows to learn from
    state, metrics = update(state, batch)            both advantages, the dual loss, the optimizer

The host's part is the same `Rollout`, so the same trajectories come of it, and the same parameters.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from hdpo_jax.algorithm.state import TrainState
from hdpo_jax.algorithm.update import Metrics, UpdateBatch
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.engine import Copies, Extension, Programs, Running, read_report
from hdpo_jax.rollout.scheduler import Round
from hdpo_jax.types import Trajectory
from models.qwen3_vl import KVCache
from sharding.rules import RULES


class Orders(NamedTuple):
    """A round, in arrays of fixed size; lanes, or rows in the order of lanes, come first in each."""

    extensions: Sequence[Extension]
    copies: Copies
    running: Running
    run: Bool[Array, "lanes programs"]
    """Which of the extensions, whether to copy and to decode, and whether there is another round."""


def make_iterate(
    programs: Programs,
    update: Callable[[TrainState, UpdateBatch], tuple[TrainState, Metrics]],
    assemble: Callable[[Sequence[Trajectory]], UpdateBatch],
    *,
    mesh: Mesh,
    nothing: Round,
    no_batch: UpdateBatch,
    shardings: TrainState | None = None,
) -> "Iterate":
    """The program, and what it calls on the host.

    `assemble` makes the update's batch of the finished trajectories: rewards are computed here. `nothing` and
    `no_batch` have the shapes and types of every round and batch. `shardings`: as for `make_update`.
    """
    host = _Host(assemble, nothing, no_batch)
    lanes = RULES.mesh_axes("slots")
    parts = int(np.prod([mesh.shape[axis] for axis in lanes]))
    by_lane = P(lanes)

    def ask(number: Array, decoded: Array, report: Array) -> Orders:
        """Every device asks for its lane's part; the host answers all of a round at once."""
        part = jax.tree.map(partial(_part, parts=parts, axis=0), host.orders_of(nothing, more=True))

        def one_lane(number: Array, decoded: Array, report: Array) -> Orders:
            lane = jax.lax.axis_index(lanes)
            answer = partial(host.orders, parts)
            return io_callback(answer, part, lane, number, decoded, report)

        specs = jax.tree.map(lambda _: by_lane, part)
        return jax.shard_map(one_lane, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)(
            number, decoded, report
        )

    def fetch(number: Array) -> tuple[UpdateBatch, Array]:
        """The batch, its rows split like every batch; all of the rest on every device."""
        split = no_batch.rows.token_ids.shape[2] % parts == 0
        axis = 2 if split else None
        cut = partial(_part, parts=parts, axis=axis)
        part = no_batch._replace(rows=jax.tree.map(cut, no_batch.rows))
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (part, np.bool_(True)))
        replicated = jax.tree.map(lambda _: P(), abstract)
        rows = jax.tree.map(lambda _: P(None, None, lanes) if split else P(), part.rows)
        specs = (replicated[0]._replace(rows=rows), P())

        def one_lane(number: Array) -> tuple[UpdateBatch, Array]:
            return io_callback(partial(host.batch, parts, axis), abstract, jax.lax.axis_index(lanes), number)

        return jax.shard_map(one_lane, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)(number)

    @partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None, None))
    def iterate(state: TrainState) -> tuple[TrainState, Metrics, Array]:
        def round_(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            number, cache, decoded, report, _ = carry
            orders = ask(number, decoded, report)
            run = orders.run.any(axis=0)
            for place, extension in enumerate(orders.extensions):
                cache = jax.lax.cond(run[place], partial(programs.extend, state.params), _same, cache, extension)
            cache = jax.lax.cond(run[-3], programs.copy, _same, cache, orders.copies)
            cache, report = jax.lax.cond(
                run[-2], partial(programs.decode, state.params), lambda cache, _: (cache, report), cache, orders.running
            )
            return number + 1, cache, run[-2], report, run[-1]

        cache = programs.empty_cache()
        _, empty_report = jax.eval_shape(programs.decode, state.params, cache, nothing.running)
        first = (jnp.int32(0), cache, jnp.bool_(False), jnp.zeros(empty_report.shape, jnp.int32), jnp.bool_(True))
        number, *_ = jax.lax.while_loop(lambda carry: carry[-1], round_, first)
        batch, sound = fetch(number)
        _, no_metrics = jax.eval_shape(update, state, batch)
        state, metrics = jax.lax.cond(
            sound,
            update,
            lambda state, _: (state, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), no_metrics)),
            state,
            batch,
        )
        return state, metrics, sound

    return Iterate(iterate, host, mesh)


@dataclass(frozen=True)
class Iterate:
    """`iterate(state, rollout) -> (state, metrics)`."""

    _program: jax.stages.Wrapped
    _host: "_Host"
    _mesh: Mesh

    def __call__(self, state: TrainState, rollout: Rollout) -> tuple[TrainState, Metrics]:
        """Samples the rollout's trajectories and learns from them; the old state's buffers are donated.

        Raises IterationFailed, with the state, where the host's part fails; no step is taken then.
        """
        self._host.begin(rollout)
        with jax.set_mesh(self._mesh):
            state, metrics, _ = jax.block_until_ready(self._program(state))
        if self._host.error is not None:
            raise IterationFailed(state) from self._host.error
        return state, metrics

    def lower(self, state: TrainState) -> jax.stages.Lowered:
        return self._program.lower(state)


class IterationFailed(Exception):
    """The host's part of an iteration failed (the cause says how); `state` is the one that the iteration began with."""

    def __init__(self, state: TrainState):
        super().__init__("the iteration was given up")
        self.state = state


class _Host:
    """What the program calls. Several devices ask for the same round; the first has it planned, all get their part."""

    def __init__(self, assemble: Callable[[Sequence[Trajectory]], UpdateBatch], nothing: Round, no_batch: UpdateBatch):
        self._assemble = assemble
        self._nothing = nothing
        self._no_batch = no_batch
        # Whoever holds it waits for tools at most, which answer or are given up; never for another device.
        self._lock = threading.Lock()

    def begin(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._number = -1
        self._batch: UpdateBatch | None = None
        self.error: BaseException | None = None

    def orders(self, parts: int, lane: Any, number: Any, decoded: Any, report: Any) -> Orders:
        with self._lock:
            if self._number != int(number):
                self._number = int(number)
                self._orders = self._next(bool(decoded), report)
            orders = self._orders
        return jax.tree.map(partial(_part, parts=parts, axis=0, part=int(lane)), orders)

    def batch(self, parts: int, axis: int | None, lane: Any, number: Any) -> tuple[UpdateBatch, np.bool_]:
        with self._lock:
            if self._batch is None:
                self._batch = self._finish()
            batch = self._batch
        rows = jax.tree.map(partial(_part, parts=parts, axis=axis, part=int(lane)), batch.rows)
        return batch._replace(rows=rows), np.bool_(self.error is None)

    def orders_of(self, now: Round, more: bool) -> Orders:
        """A round as arrays: what it leaves out is not run."""
        programs = [*now.extensions, now.copies, now.running]
        empty = self._nothing
        extensions: Any = [one or other for one, other in zip(now.extensions, empty.extensions, strict=True)]
        copies: Any = now.copies or empty.copies
        running: Any = now.running or empty.running
        run: Any = np.asarray([[*(program is not None for program in programs), more]] * len(copies.source))
        return Orders(extensions, copies, running, run)

    def _next(self, decoded: bool, report: Any) -> Orders:
        try:
            now = self._rollout.next(read_report(np.asarray(report)) if decoded else None)
        except BaseException as error:  # into the program it can not go: the loop ends, and `iterate` raises it
            self.error, now = error, None
        nothing = Round([None] * len(self._nothing.extensions), None, None)
        return self.orders_of(now or nothing, more=now is not None)

    def _finish(self) -> UpdateBatch:
        if self.error is None:
            try:
                return self._assemble(self._rollout.trajectories)
            except BaseException as error:
                self.error = error
        return self._no_batch


def _same(cache: KVCache, _: Any) -> KVCache:
    return cache


def _part(leaf: Any, *, parts: int, axis: int | None, part: int = 0) -> Any:
    """One of so many equal parts of an array along `axis`; all of it where that is None."""
    leaf = np.asarray(leaf)
    return leaf if axis is None else np.split(leaf, parts, axis=axis)[part]
