"""Rollouts whose tools are on a server are those whose tools are here, token for token."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from PIL import Image

from hdpo_jax.config import ToolsConfig, ToolServerConfig
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.tools import Subject, Tool, ToolBox, open_toolbox
from hdpo_jax.tools.protocol import Tools, TrajectoryTools
from hdpo_jax.tools.server import tool_server
from hdpo_jax.types import Observation, StopReason, ToolCall
from tests.rollout.chatty import AGENT, ROLLOUT
from tests.tools.serving import served


class Camera:
    """Shows a picture at every other call."""

    name = "camera"
    schema = {"type": "function", "function": {"name": "camera", "parameters": {"type": "object"}}}

    def __init__(self):
        self.open_now = 0

    def open(self, subject: Subject) -> "Roll":
        self.open_now += 1
        return Roll(self, subject)

    def close(self) -> None: ...


class Roll:
    def __init__(self, camera: Camera, subject: Subject):
        self.camera, self.subject, self.calls = camera, subject, 0

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        self.calls += 1
        picture = Image.new("RGB", (32, 16), (40 * self.calls, 80, 120))
        text = f"call {self.calls} of {len(self.subject.images)}"
        return Observation(text=text, images=[picture] * (self.calls % 2))

    def close(self) -> None:
        self.camera.open_now -= 1


class Cameras(ToolBox):
    def __init__(self, camera: Camera):
        self.workers = 4
        self._refuse_repeats = ()
        self._tools: dict[str, Tool] = {"camera": camera}


class Asking:
    """Whatever the policy writes, which is noise, the camera is what it asks for."""

    def __init__(self, tools: Tools):
        self.workers, self.tools = tools.workers, tools

    def session(self, images: Sequence[bytes], keys: Sequence[str] = ()) -> TrajectoryTools:
        tools = self.tools.session(images, keys)

        class Session:
            def call(self, call: ToolCall) -> Observation:
                return tools.call(ToolCall(name="camera", arguments={}))

            def close(self) -> None:
                tools.close()

        return Session()


def sample(task, policy, tools: Tools):
    asking: Any = Asking(tools)
    sampler = Sampler(policy.model, policy.processor, asking, mesh=policy.mesh, agent=AGENT, rollout=ROLLOUT, seed=3)
    return sampler.sample(policy.params, task.prompts[:5], samples=2, step=5)


@pytest.mark.slow
def test_a_server_changes_no_trajectory(task, policy):
    here = sample(task, policy, Cameras(Camera()))
    camera = Camera()
    with served(tool_server(Cameras(camera), ToolServerConfig())) as address:
        with open_toolbox(ToolsConfig(servers=(address,), workers=4)) as box:
            there = sample(task, policy, box)
        assert camera.open_now == 0
    assert sum(one.calls for one in here) > 5
    assert any(len(one.images) > one.prompt_images for one in here)
    for ours, theirs in zip(there, here, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert (ours.calls, ours.stop) == (theirs.calls, theirs.stop)
        assert [turn.text for turn in ours.turns] == [turn.text for turn in theirs.turns]


@pytest.mark.slow
def test_a_lost_server_drops_the_rollouts_that_needed_it(task, policy):
    with served(tool_server(Cameras(Camera()), ToolServerConfig())) as address:
        box = open_toolbox(ToolsConfig(servers=(address,), workers=4, lost_seconds=0.5))
    with box:
        found = sample(task, policy, box)
    assert len(found) == 10
    for one in found:
        assert (one.stop is StopReason.DROPPED) is (one.calls > 0)
        assert one.usable is (one.calls == 0)
