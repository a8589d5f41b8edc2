"""One iteration as one XLA program: sampling, tools, rewards, advantages, losses, and the optimizer's step.

The programs of a host-driven rollout, in a loop on the device that asks the host, between chunks, what to run next:

    until the host says that every trajectory has ended:
        orders = io_callback(what was sampled)       tools run, observations come back
        extend, copy, decode                         as ordered
    batch = io_callback()                            rewards, and the rows to learn from
    state, metrics = update(state, batch)            both advantages, the dual loss, the optimizer

The host's part is the same `Rollout`, so the same trajectories come of it, and the same parameters. Where there are
several processes, each answers for the lanes of its own devices; what any of them has something for runs everywhere.
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
from hdpo_jax.config import ConfigError
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.engine import Copies, Experts, Extension, Programs, Report, Running, read_report
from hdpo_jax.rollout.lockstep import Lanes, filled, in_order, orders
from hdpo_jax.rollout.scheduler import Round
from hdpo_jax.types import Trajectory
from models.qwen3_vl import Cache
from sharding.multihost import give_up
from sharding.rules import RULES


class Orders(NamedTuple):
    """A round, in arrays of fixed size; lanes, or rows in the order of lanes, come first in each."""

    extensions: Sequence[Extension]
    copies: Copies
    running: Running
    run: Bool[Array, "lanes programs"]
    """Which of the extensions, whether to copy and to decode; whether to go on after them, and whether to give up."""


class Told(NamedTuple):
    """What the programs of a round tell the host."""

    experts: Sequence[Experts | None]
    """Each extension's; what one told that is not run this time stands there still."""
    report: Report


def make_iterate(
    programs: Programs,
    update: Callable[[TrainState, UpdateBatch], tuple[TrainState, Metrics]],
    assemble: Callable[[Sequence[Trajectory]], UpdateBatch],
    *,
    mesh: Mesh,
    nothing: Round,
    no_batch: UpdateBatch,
    shardings: TrainState | None = None,
) -> "FusedIteration":
    """The program, and what it calls on the host.

    `assemble` makes the update's batch of the finished trajectories: rewards are computed here. `nothing` and
    `no_batch` have the shapes and types of every round and batch. `shardings`: as for `make_update`.
    """
    of_mesh = Lanes.of(mesh)
    host = _Host(assemble, nothing, no_batch, of_mesh)
    lanes = RULES.mesh_axes("slots")
    by_lane = P(lanes)
    mini_batches, _, rows_a_process = no_batch.rows.token_ids.shape[:3]
    split = rows_a_process % len(of_mesh.own) == 0
    if not split and jax.process_count() > 1:
        raise ConfigError(
            f"there are {rows_a_process} rows a micro-batch for the {len(of_mesh.own)} lanes of a process; expected "
            "train.micro_batch_rows to be a multiple of all lanes"
        )

    def ask(number: Array, decoded: Array, told: Told) -> Orders:
        """Every device asks for its lane's part; its host answers all of a round at once."""
        part = jax.tree.map(host.part_of, host.orders_of(nothing))

        def one_lane(number: Array, decoded: Array, told: Told) -> Orders:
            return io_callback(host.orders, part, jax.lax.axis_index(lanes), number, decoded, told)

        specs = jax.tree.map(lambda _: by_lane, part)
        return jax.shard_map(one_lane, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)(number, decoded, told)

    def fetch(failed: Array) -> tuple[UpdateBatch, Array]:
        """The batch, its rows split like every batch, all of the rest on every device; and whether it is sound."""
        axis = 2 if split else None
        part = no_batch._replace(rows=jax.tree.map(partial(host.part_of, axis=axis), no_batch.rows))
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (part, np.bool_(True)))
        rows = jax.tree.map(lambda _: P(None, None, lanes) if split else P(), part.rows)
        specs = (jax.tree.map(lambda _: P(), part)._replace(rows=rows), P())

        def one_lane(failed: Array) -> tuple[UpdateBatch, Array]:
            answer = partial(host.batch, axis)
            batch, sound = io_callback(answer, abstract, jax.lax.axis_index(lanes), failed)
            rows, *others = batch
            micro_batches, *values = jax.lax.all_gather(others, lanes)
            values = (in_order(each[of_mesh.leads], mini_batches) for each in values)
            return UpdateBatch(rows, micro_batches.max(axis=0), *values), jax.lax.all_gather(sound, lanes).all()

        return jax.shard_map(one_lane, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)(failed)

    @partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None, None))
    def iterate(state: TrainState) -> tuple[TrainState, Metrics, Array]:
        laid_out = programs.lay_out(state.params)

        def round_(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            number, cache, decoded, told, *_ = carry
            orders = ask(number, decoded, told)
            run = orders.run.any(axis=0)
            experts = list(told.experts)
            for place, extension in enumerate(orders.extensions):
                extend, same = partial(programs.extend, state.params), partial(_same, experts[place])
                cache, experts[place] = jax.lax.cond(run[place], extend, same, cache, extension)
            copies, decodes, more, failed = run[-4:]
            cache = jax.lax.cond(copies, programs.copy, lambda cache, _: cache, cache, orders.copies)
            decode, same = partial(programs.decode, laid_out), partial(_same, told.report)
            cache, report = jax.lax.cond(decodes, decode, same, cache, orders.running)
            return number + 1, cache, decodes, Told(experts, report), more & ~failed, failed

        def of_all_lanes(own: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((own.shape[0] // len(of_mesh.own) * of_mesh.count, *own.shape[1:]), own.dtype)

        cache, everyone = programs.empty_cache(), jax.tree.map(of_all_lanes, nothing)
        _, report = jax.eval_shape(programs.decode, laid_out, cache, everyone.running)
        extend = partial(jax.eval_shape, programs.extend, state.params, cache)
        told = Told([extend(extension)[1] for extension in everyone.extensions], report)
        no, yes = jnp.bool_(False), jnp.bool_(True)
        first = (jnp.int32(0), cache, no, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), told), yes, no)
        *_, failed = jax.lax.while_loop(lambda carry: carry[-2], round_, first)
        batch, sound = fetch(failed)
        _, no_metrics = jax.eval_shape(update, state, batch)
        state, metrics = jax.lax.cond(
            sound,
            update,
            lambda state, _: (state, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), no_metrics)),
            state,
            batch,
        )
        return state, metrics, sound

    return FusedIteration(iterate, host, mesh)


@dataclass(frozen=True)
class FusedIteration:
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
            done = None
            try:
                done = self._program(state)
                state, metrics, sound = jax.block_until_ready(done)
            except BaseException:  # Ctrl-C: the program goes on asking, so it has to hear of it before this can end
                rollout.cancel()
                self._host.settle()
                jax.block_until_ready(done)
                raise
        if not sound:
            try:
                give_up(self._host.error)
            except BaseException as error:
                raise IterationFailed(state) from error
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

    def __init__(
        self,
        assemble: Callable[[Sequence[Trajectory]], UpdateBatch],
        nothing: Round,
        no_batch: UpdateBatch,
        lanes: Lanes,
    ):
        self._assemble = assemble
        self._nothing = nothing
        self._no_batch = no_batch
        self._lanes = lanes
        self.error: BaseException | None = None
        # Whoever holds it waits for tools at most, which answer or are given up; never for another device.
        self._lock = threading.Lock()

    def begin(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._number = -1
        self._batch: UpdateBatch | None = None
        self.error = None

    def settle(self) -> None:
        """Waits until what the program has asked for is answered."""
        with self._lock:
            pass

    def orders(self, lane: Any, number: Any, decoded: Any, told: Told) -> Orders:
        with self._lock:
            if self._number != int(number):
                self._number = int(number)
                self._orders = self._next(bool(decoded), told)
            orders = self._orders
        return jax.tree.map(partial(self.part_of, lane=int(lane)), orders)

    def batch(self, axis: int | None, lane: Any, failed: Any) -> tuple[UpdateBatch, np.bool_]:
        with self._lock:
            if self._batch is None:
                self._batch = self._no_batch if failed else self._finish()
            batch = self._batch
        rows = jax.tree.map(partial(self.part_of, axis=axis, lane=int(lane)), batch.rows)
        return batch._replace(rows=rows), np.bool_(self.error is None and not failed)

    def orders_of(self, now: Round | None) -> Orders:
        """A round as arrays: what it leaves out is not run."""
        *extensions, copies, running = filled(now, self._nothing).programs
        run = orders(now, self._nothing, failed=self.error is not None)
        arrays: Any = extensions, copies, running, np.tile(run, (len(self._lanes.own), 1))
        return Orders(*arrays)

    def part_of(self, leaf: Any, *, axis: int | None = 0, lane: int | None = None) -> Any:
        """A lane's part of an array along `axis` (all of it where that is None); any lane's for its shape."""
        leaf, own = np.asarray(leaf), self._lanes.own
        return leaf if axis is None else np.split(leaf, len(own), axis=axis)[0 if lane is None else own.index(lane)]

    def _next(self, decoded: bool, told: Told) -> Orders:
        now = None
        try:
            experts, report = jax.tree.map(self._own_rows, told)
            self._rollout.record(experts)
            now = self._rollout.next(read_report(report) if decoded else None)
        except BaseException as error:  # into the program it can not go: the loop ends, and `iterate` raises it
            self.error = error
        return self.orders_of(now)

    def _own_rows(self, array: Any) -> np.ndarray:
        """Of an array with the rows, or slots, of all lanes."""
        by_lane = np.asarray(array).reshape(self._lanes.count, -1, *array.shape[1:])
        return by_lane[self._lanes.own].reshape(-1, *array.shape[1:])

    def _finish(self) -> UpdateBatch:
        try:
            return self._assemble(self._rollout.trajectories)
        except BaseException as error:
            self.error = error
        return self._no_batch


def _same(told: Any, cache: Cache, _: Any) -> tuple[Cache, Any]:
    return cache, told
