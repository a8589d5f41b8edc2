"""What a trajectory's view of its tools does by itself, whatever the tools are."""

from collections.abc import Mapping
from typing import Any

from hdpo_jax.tools import Session, Subject
from hdpo_jax.types import Observation, ToolCall


class Counter:
    """Counts its calls; the word "fail" fails."""

    name = "count"
    schema = {
        "type": "function",
        "function": {"name": "count", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}},
    }

    def __init__(self):
        self.calls = 0

    def open(self, subject: Subject) -> "Counter":
        return self

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        self.calls += 1
        return Observation(text=str(self.calls), ok=arguments.get("word") != "fail")

    def close(self) -> None: ...


def ask(session: Session, **arguments: str) -> Observation:
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
