"""One of the processes that test_processes.py starts: does what the test asks for, on its own devices and prompts."""

import itertools
import pickle
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hdpo_jax.data.pipeline import share
from hdpo_jax.rollout.fused import IterationFailed
from hdpo_jax.rollout.lockstep import Lanes
from hdpo_jax.types import Observation, ToolCall
from sharding import make_mesh, multihost, shard_batch
from tests.rollout.chatty import AGENT, Task, chatty_policy
from tests.rollout.iterations import MINI_BATCHES, PROMPTS, Setting, host_driven
from tests.rollout.test_agent import Camera

CALL_SECONDS = 15.0


class Tools(Camera):
    """A camera; once it is told to, its next call never answers, the second takes a while, and the third fails."""

    troubled = False

    def __init__(self):
        super().__init__()
        self.troubles = itertools.count(1)

    def session(self, images, keys=()):
        session, toolbox = super().session(images), self
        answer = session.call

        def troubled_call(call: ToolCall) -> Observation:
            if toolbox.troubled:
                trouble = next(toolbox.troubles)
                time.sleep({1: 3600, 2: 1.5}.get(trouble, 0))
                if trouble == 3:
                    raise RuntimeError("the disk is full")
            return answer(call)

        session.call = troubled_call
        return session


def whole(tree: Any, mesh: jax.sharding.Mesh) -> list[Any]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.leaves(jax.device_get(jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)))


def main(directory: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    multihost.start()
    me, count = jax.process_index(), jax.process_count()
    task = Task(checkpoint=directory / "model", prompts=pickle.loads((directory / "prompts").read_bytes()))
    policy = chatty_policy(task, devices=jax.device_count())
    prompts, numbers = task.prompts[:PROMPTS], share(PROMPTS, me, count, parts=MINI_BATCHES).tolist()
    tools = Tools()
    setting = Setting(policy, tools, numbers=numbers, agent=replace(AGENT, call_seconds=CALL_SECONDS), slots=8)
    seen: dict[str, Any] = {"numbers": numbers}

    state, found, metrics = host_driven(setting, prompts, steps=1)
    seen["host_driven"] = (whole(state.params, policy.mesh), found, metrics)
    seen["stats"] = (setting.sampler.stats, setting.sampler.stats.of_all_processes())

    tools.troubled = me == 1
    seen["troubled"] = setting.sample(policy.params, prompts, step=0)
    tools.troubled = False

    def interrupt(trajectory):
        if me == 1:
            raise KeyboardInterrupt("enough")

    try:
        setting.sample(policy.params, prompts, step=0, on_finished=interrupt)
    except BaseException as error:
        seen["failed"] = repr(error)

    iterate, state = setting.fused(), setting.state()
    rollout = setting.rollout(prompts, step=0, on_finished=interrupt)
    try:
        iterate(state, rollout)
    except IterationFailed as failed:
        seen["fused failed"], state = repr(failed.__cause__), failed.state
    rollout.close()

    rollout = setting.rollout(prompts, step=0)
    state, metrics = iterate(state, rollout)
    rollout.close()
    seen["fused"] = (whole(state.params, policy.mesh), rollout.trajectories, jax.device_get(metrics))

    seen["refused"] = []
    for axis in ("tensor", "context"):
        mesh = make_mesh({axis: 4})
        for use in (Lanes.of, partial(shard_batch, np.zeros((2, 4)))):
            try:
                use(mesh)
            except ValueError as error:
                seen["refused"].append(str(error))
    (directory / f"seen_{me}").write_bytes(pickle.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
