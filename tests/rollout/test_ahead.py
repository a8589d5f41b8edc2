"""Rollouts a step ahead: which parameters sampled them, and that nothing of them stays behind."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import jax
import pytest

from hdpo_jax.rollout.ahead import Ahead
from hdpo_jax.rollout.prompts import PromptTooLong
from hdpo_jax.types import ToolCall
from tests.rollout.chatty import AGENT
from tests.rollout.test_agent import Camera, assert_same, sampler


class Held(Camera):
    """A toolbox whose tools can be held up."""

    def __init__(self):
        super().__init__()
        self.asked, self.released = threading.Event(), threading.Event()
        self.released.set()

    def session(self, images, keys=()):
        session = super().session(images)
        answer = session.call

        def held(call: ToolCall):
            self.asked.set()
            self.released.wait()
            return answer(call)

        session.call = held
        return session


@pytest.fixture(scope="module")
def tools() -> Held:
    return Held()


@pytest.fixture(scope="module")
def ours(policy, tools):
    return sampler(policy, tools, agent=replace(AGENT, call_seconds=500.0))


@pytest.fixture
def params(policy):
    return jax.tree.map(lambda leaf: leaf.copy(), policy.params)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def learned(params):
    """Other parameters, as an update would leave them; the old buffers are gone."""
    new = jax.tree.map(lambda leaf: leaf * 1.5, params)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    return new


def test_a_step_is_sampled_by_what_the_step_before_began_with(task, policy, params, ours):
    batches = [task.prompts[:2], task.prompts[2:4], task.prompts[4:6]]
    expected = [ours.sample(policy.params, batch, samples=2, step=1 + i) for i, batch in enumerate(batches)]
    coming = iter(batches[1:])
    with closing(Ahead(ours, lambda: next(coming), samples=2, steps=3)) as ahead:
        assert_same(ahead(params, batches[0], 1).trajectories, expected[0])
        params = learned(params)
        # By the old parameters, of which only the copy is left.
        assert_same(ahead(params, batches[1], 2).trajectories, expected[1])
        found = ahead(learned(params), batches[2], 3).trajectories
    newer = ours.sample(learned(jax.tree.map(lambda leaf: leaf.copy(), policy.params)), batches[2], samples=2, step=3)
    assert_same(found, newer)
    assert [one.token_ids.tolist() for one in newer] != [one.token_ids.tolist() for one in expected[2]]
    assert next(coming, None) is None


def test_the_next_step_is_under_way_before_it_is_asked_for(task, params, ours, tools):
    def upcoming():
        tools.asked.clear()
        return task.prompts[2:4]

    with closing(Ahead(ours, upcoming, samples=2, steps=2)) as ahead:
        ahead(params, task.prompts[:2], 1)
        assert tools.asked.wait(300)
        ahead(learned(params), task.prompts[2:4], 2)


def test_what_fails_in_the_thread_is_raised_by_the_step_that_needs_it(task, params, ours):
    (prompt,) = task.prompts[:1]
    (system, *others), text = prompt.messages, "A" * 1000
    endless = replace(prompt, id="endless", messages=[{**system, "content": text}, *others])
    with closing(Ahead(ours, lambda: [endless], samples=2, steps=2)) as ahead:
        assert len(ahead(params, [prompt], 1).trajectories) == 2
        with pytest.raises(PromptTooLong, match="endless"):
            ahead(params, [endless], 2)


def test_closing_gives_up_what_waits_for_a_tool(task, params, ours, tools):
    """A run that ends early, by an error or a signal, does not wait for answers that nobody needs any more."""

    def upcoming():
        tools.released.clear()
        tools.asked.clear()
        return task.prompts[2:4]

    with closing(Ahead(ours, upcoming, samples=2, steps=2)) as ahead:
        ahead(params, task.prompts[:2], 1)
        assert tools.asked.wait(300)
        started = time.monotonic()
        ahead.close()
        assert time.monotonic() - started < 100
    tools.released.set()
    assert tools.open == 0
