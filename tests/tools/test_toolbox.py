"""What a trajectory's view of its tools does by itself, whatever the tools are."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools import Session, Subject, ToolBox
from hdpo_jax.types import Observation, ToolCall


class Counter:
    """Counts its calls; the word "fail" fails, the word "raise" raises."""

    name = "count"
    schema = {
        "type": "function",
        "function": {"name": "count", "parameters": {"type": "object", "properties": {"word": {}}}},
    }

    def __init__(self):
        self.calls = 0

    def open(self, subject: Subject) -> "Counter":
        return self

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        self.calls += 1
        if arguments.get("word") == "raise":
            raise RuntimeError("out of order")
        return Observation(text=str(self.calls), ok=arguments.get("word") != "fail")

    def close(self) -> None: ...


def ask(session: Session, **arguments: Any) -> Observation:
    return session.call(ToolCall(name="count", arguments=arguments))


def test_a_repeated_call_is_refused_with_a_note():
    counter = Counter()
    session = Session({"count": counter}, Subject(), refuse_repeats=("count",))
    assert ask(session, word="a").text == "1"
    refused = ask(session, word="a")
    assert not refused.ok and refused.text == "[count was already called with these arguments: see above.]"
    assert ask(session, word="b").text == "2"
    # Another trajectory has seen nothing yet.
    assert ask(Session({"count": counter}, Subject(), refuse_repeats=("all",)), word="a").text == "3"


def test_what_failed_may_be_tried_again():
    counter = Counter()
    session = Session({"count": counter}, Subject(), refuse_repeats=("all",))
    assert [ask(session, word="fail").text for _ in range(3)] == ["1", "2", "3"]


def test_other_tools_may_be_called_as_often_as_a_policy_likes():
    session = Session({"count": Counter()}, Subject(), refuse_repeats=("image_search",))
    assert [ask(session).text for _ in range(3)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"word": {"a": 1, "b": [2]}}, {"word": {"b": [2], "a": 1}}, True),
        ({"word": "grüße"}, {"word": "gr\u00fc\u00dfe"}, True),
        ({"word": "\ud800"}, {"word": "\ud800"}, True),
        ({"word": float("nan")}, {"word": float("nan")}, True),
        ({"word": 1}, {"word": "1"}, False),
        ({"word": None}, {}, False),
        ({"word": "a"}, {"word": "A"}, False),
        ({"word": "x" * 1_000_000}, {"word": "x" * 1_000_000}, True),
        ({"word": frozenset("a")}, {"word": frozenset("a")}, True),  # no JSON, but no reason to raise
    ],
    ids=["order", "unicode", "surrogate", "nan", "types", "absent", "case", "long", "no json"],
)
def test_calls_are_the_same_when_they_say_the_same(first, second, same):
    session = Session({"count": Counter()}, Subject(), refuse_repeats=("all",))
    assert ask(session, **first).text == "1"
    assert ask(session, **second).ok is not same


def test_what_was_asked_takes_little_room():
    session = Session({"count": Counter()}, Subject(), refuse_repeats=("all",))
    for number in range(100):
        ask(session, word=f"{number}" * 10_000)
    assert sum(map(len, session._asked)) < 10_000


def test_the_same_call_from_two_threads_runs_once():
    class Slow(Counter):
        def call(self, arguments):
            time.sleep(0.1)
            return super().call(arguments)

    counter = Slow()
    session = Session({"count": counter}, Subject(), refuse_repeats=("all",))
    together = threading.Barrier(8)

    def call(number: int) -> bool:
        together.wait()
        return ask(session, word="a").ok

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(call, range(8))) == 1
    assert counter.calls == 1


def test_what_raised_may_be_tried_again():
    session = Session({"count": Counter()}, Subject(), refuse_repeats=("all",))
    assert [ask(session, word="raise").text for _ in range(2)] == ["The count tool failed."] * 2


def test_a_closed_session_says_that_it_is_closed_of_a_repeated_call_too():
    session = Session({"count": Counter()}, Subject(), refuse_repeats=("all",))
    ask(session, word="a")
    session.close()
    assert ask(session, word="a").lost and ask(session, word="b").lost


def test_one_tool_that_does_not_close_keeps_no_other_open():
    class Sticky(Counter):
        closed = 0

        def close(self):
            Sticky.closed += 1
            raise RuntimeError("stuck")

    session = Session({"a": Sticky(), "b": Sticky()}, Subject())
    for name in ("a", "b"):
        session.call(ToolCall(name=name, arguments={}))
    with pytest.raises(RuntimeError, match="stuck"):
        session.close()
    assert Sticky.closed == 2


# The box


FUNCTIONS = ToolsConfig(names=(), functions=("tests.tools.my_tools:shout",))


def test_tools_of_which_repeats_are_refused_must_be_known():
    with pytest.raises(ConfigError, match="tools.refuse_repeats holds 'shuot'; expected names among .*, shout, all"):
        ToolBox(replace(FUNCTIONS, refuse_repeats=("shuot",)))
    with ToolBox(replace(FUNCTIONS, refuse_repeats=("search", "image_search", "shout"))) as box, box.session([]) as one:
        twice = [one.call(ToolCall(name="shout", arguments={"text": "a"})) for _ in range(2)]
    assert [answer.ok for answer in twice] == [True, False]


def test_an_alias_stands_for_its_tool():
    """`search` is text_search: what a policy writes is resolved before a session sees it, and so are settings."""
    with ToolBox(replace(FUNCTIONS, refuse_repeats=("search",))) as box:
        assert "text_search" in box._refuse_repeats


def test_what_was_opened_is_closed_when_a_later_one_fails(monkeypatch):
    closed = []

    class First(Counter):
        name = "python"

        def __init__(self, config):
            super().__init__()

        def close(self):
            closed.append("python")

    monkeypatch.setattr("hdpo_jax.tools.toolbox.TOOLS", {"python": First})
    with pytest.raises(ConfigError, match="there is no module no_such_module"):
        ToolBox(ToolsConfig(functions=("no_such_module:f",)))
    assert closed == ["python"]
