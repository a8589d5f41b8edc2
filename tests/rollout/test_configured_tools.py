"""Tools that a run names in its configuration, called by a policy: every call is answered, and counts in T."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hdpo_jax.config import ToolsConfig
from hdpo_jax.rewards import tool_reward
from hdpo_jax.tools import ToolBox
from hdpo_jax.types import StopReason, ToolCall, Turn
from tests.rollout.chatty import AGENT, ROLLOUT

SERVER = f"{sys.executable} {Path(__file__).parents[1] / 'tools' / 'mcp_server.py'}"
TOOLS = ToolsConfig(
    names=(),
    functions=("tests.tools.my_tools:shout", "tests.tools.my_tools:fail"),
    mcp=(SERVER,),
    refuse_repeats=("shout",),
)
pytestmark = pytest.mark.slow
NOTE = "[shout was already called with these arguments: see above.]"
CALLS = (
    (ToolCall(name="shout", arguments={"text": "a"}), "AA"),
    (ToolCall(name="fail", arguments={"how": ""}), "[fail failed: KeyError: 'nothing']"),
    (ToolCall(name="shout", arguments={"text": "a"}), "AA"),
    (ToolCall(name="add", arguments={"a": 19, "b": 23}), "42"),
    (ToolCall(name="broken", arguments={"word": "x"}), "Error executing tool broken: no such word: x"),
    (ToolCall(name="picture", arguments={"width": 64, "height": 32}), ""),
    (ToolCall(name="add", arguments={"a": "x", "b": 1}), "add: argument `a` is a string; expected a whole number."),
)
"""What a turn stands for, as this policy's own words make no calls; and what each is answered."""


def meant(text: str) -> tuple[ToolCall, str]:
    return CALLS[sum(map(ord, text)) % len(CALLS)]


@pytest.fixture(scope="module")
def trajectories(task, policy):
    agent = replace(AGENT, max_observation_tokens=200, max_response_tokens=600)
    with ToolBox(TOOLS) as toolbox, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hdpo_jax.rollout.agent.parse_tool_call", lambda text: meant(text)[0])
        sampler = policy.sampler(toolbox, agent=agent, rollout=replace(ROLLOUT, capacity=700, page=32), seed=3)
        return sampler.sample(policy.params, task.prompts[:4], samples=8, step=5)


def answered(turns: list[Turn]) -> list[tuple[str, str]]:
    """Each call's turn, and its answer."""
    return [(one.text, two.text) for one, two in pairwise(turns) if two.role == "tool"]


def test_every_call_is_answered_by_its_tool(trajectories):
    heard = set()
    for one in trajectories:
        shouted = False
        for asked, said in answered(one.turns):
            call, expected = meant(asked)
            assert said == (NOTE if call.name == "shout" and shouted else expected)
            shouted = shouted or call.name == "shout"
            heard.add(said)
    assert heard == {NOTE, *(said for _, said in CALLS)}


def test_images_of_an_mcp_server_reach_the_policy(trajectories):
    shown = [image.size for one in trajectories for turn in one.turns for image in turn.images]
    assert shown and set(shown) == {(64, 32)}
    assert sum(len(one.images) - one.prompt_images for one in trajectories) == len(shown)


def test_every_call_counts_in_t(trajectories):
    """Refused repeats too, or a policy could loop for nothing: 1 / (T + 1) is 1/3 after two; were one free, 1/2."""
    for one in trajectories:
        # The answer to the last call may have found no room.
        unread = one.stop is StopReason.TOKEN_BUDGET and one.turns[-1].text.endswith("</tool_call>")
        assert one.calls == len(answered(one.turns)) + unread
    refused = [one for one in trajectories if one.calls == 2 and one.turns[3].text == NOTE]
    assert refused
    assert tool_reward(refused[0].calls, correct=True) == pytest.approx(1 / 3)
