"""Several processes sample in lock-step: each plans the slots of its own devices, and all run the same programs.

There is no controller. Before every round the processes tell each other, in one small all-gather, which programs they
have something for; what anyone needs runs everywhere, and whoever has nothing for it passes its empty arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from hdpo_jax.config import ConfigError
from hdpo_jax.rollout.agent import Rollout
from hdpo_jax.rollout.engine import Chunk
from hdpo_jax.rollout.scheduler import Round
from sharding.multihost import agree, give_up, host_local_to_global
from sharding.rules import RULES, owners, spec


@dataclass(frozen=True)
class Lanes:
    """The lanes of a mesh, and which of them are this process's: its devices hold their slots and pages."""

    processes: Sequence[int]
    """The process that has each lane."""

    @classmethod
    def of(cls, mesh: Mesh) -> "Lanes":
        """Raises ConfigError where the devices of a row, in a lane or in a batch, are not of one process."""
        found = owners(mesh, "slots")
        shares = {process: sum(process in lane for lane in found) for process in range(jax.process_count())}
        if max(map(len, owners(mesh, "batch"))) > 1 or len(set(shares.values())) > 1:
            raise ConfigError(
                f"mesh {dict(mesh.shape)} over {jax.process_count()} processes: expected as many parts of data x fsdp "
                "in each process, none in two; mesh.tensor x mesh.context has to divide a process's devices"
            )
        return cls([lane[0] for lane in found])

    @property
    def count(self) -> int:
        return len(self.processes)

    @property
    def own(self) -> list[int]:
        return [lane for lane, process in enumerate(self.processes) if process == jax.process_index()]

    @property
    def leads(self) -> Int[np.ndarray, " processes"]:
        """One lane of each process."""
        return np.asarray([self.processes.index(process) for process in sorted(set(self.processes))])


def next_round(rollout: Rollout, chunk: Chunk | None, nothing: Round, mesh: Mesh) -> Round | None:
    """The round that all processes run now, after `chunk`, as arrays over the whole mesh; None when all have ended.

    Raises what the host's part raised, here or (OtherProcessFailed) in another process.
    """
    now, error = None, None
    try:
        now = rollout.next(chunk)
    except BaseException as caught:
        error = caught
    anyone: Any = agree(orders(now, nothing, failed=error is not None)).any(axis=0)
    *run, more, failed = anyone
    if failed:
        give_up(error)
    if not more:
        return None
    programs = zip(run, filled(now, nothing).programs, strict=True)
    return Round.of([spread(program, mesh) if runs else None for runs, program in programs])


def spread(program: Any, mesh: Mesh) -> Any:
    """Every process's part of a program's arrays, lanes or rows in their order, as arrays over the whole mesh."""
    return host_local_to_global(program, mesh, spec(RULES, ("slots",), mesh))


def orders(now: Round | None, nothing: Round, *, failed: bool) -> Bool[np.ndarray, " orders"]:
    """Which programs a process has something for; then whether it is to go on after them, and whether it gives up."""
    programs = [None for _ in nothing.programs] if now is None else now.programs
    return np.asarray([*(program is not None for program in programs), now is not None, failed])


def filled(now: Round | None, nothing: Round) -> Round:
    """A round with nothing to do where it leaves a program out."""
    if now is None:
        return nothing
    pairs = zip(now.programs, nothing.programs, strict=True)
    return Round.of([empty if program is None else program for program, empty in pairs])


def in_order(values: Array, mini_batches: int) -> Array:
    """[processes, prompts, rollouts] -> [all prompts, rollouts]: every process has a part of each mini-batch."""
    processes, _, rollouts = values.shape
    return values.reshape(processes, mini_batches, -1, rollouts).swapaxes(0, 1).reshape(-1, rollouts)
