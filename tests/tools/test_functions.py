"""Tools from Python functions: what their signatures say, what they get, what comes of what they return."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools import ToolBox
from hdpo_jax.tools.functions import LEFT_BEHIND
from hdpo_jax.types import Observation, ToolCall
from tests.tools import my_tools

FILE = Path(__file__).with_name("my_tools.py")
MODULE = "tests.tools.my_tools"
NAMES = ("weather", "route", "shout", "later", "look", "paint", "give", "fail", "hang", "nap")
CONFIG = ToolsConfig(
    names=(),
    functions=tuple(f"{MODULE}:{name}" for name in NAMES),
    timeout_seconds=0.5,
    output_chars=1_000,
    max_images=4,
    workers=2,
)

Ask = Callable[..., Observation]


def asker(box: ToolBox) -> Ask:
    session = box.session([b"12345"], ["key-1"])
    return lambda name, **arguments: session.call(ToolCall(name=name, arguments=arguments))


@pytest.fixture(scope="module")
def box() -> Iterator[ToolBox]:
    with ToolBox(CONFIG) as box:
        yield box


@pytest.fixture
def tool(box) -> Ask:
    return asker(box)


def schema_of(box: ToolBox, name: str) -> Any:
    return next(schema["function"] for schema in box.schemas if schema["function"]["name"] == name)


# What the policy is told


def test_a_signature_and_a_docstring_become_a_schema(box):
    found = schema_of(box, "weather")
    assert found["description"] == "Says how the weather will be.\n\nOf cities only.\n\nReturns: A sentence."
    parameters = found["parameters"]
    assert parameters["required"] == ["city"] and parameters["additionalProperties"] is False
    properties = parameters["properties"]
    assert properties["city"] == {"type": "string", "description": "Where, in English."}
    assert properties["days"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 7,
        "default": 1,
        "description": "How many.",
    }
    assert properties["when"]["description"] == "The day, as in 2024-05-06."
    assert parameters["$defs"]["Options"]["properties"]["unit"]["enum"] == ["C", "F"]


def test_other_styles_of_docstrings_describe_arguments_too(box):
    assert schema_of(box, "route")["parameters"]["properties"]["places"]["description"] == "In this order."
    assert schema_of(box, "shout")["parameters"]["properties"]["text"]["description"] == "What."


def test_the_subject_is_not_the_policys_to_give(box, tool):
    assert schema_of(box, "look")["parameters"]["properties"].keys() == {"which"}
    assert tool("look").text == '["5 bytes, of key-1"]'
    assert tool("look", subject="mine").text == "look: unknown argument `subject`; expected `which` (integer)."


# What a function gets


def test_arguments_are_checked_and_converted(tool):
    assert tool("weather", city="Rome").text == "Rome: 1 days in C, today"
    told = tool("weather", city="Rome", days=3.0, options={"unit": "F"}, when="2024-05-06")
    assert told.text == "Rome: 3 days in F, 2024-05-06"
    assert tool("shout", text="a").text == "AA" and tool("shout", text="a", times=3).text == "AAA"
    route = tool("route", places=[{"name": "a", "at": {"x": 1}}, {"name": "b"}], weights={"k": 1})
    assert json.loads(route.text) == {
        "places": [{"name": "a", "at": {"x": 1, "y": 0}}, {"name": "b", "at": None}],
        "weights": {"k": 1.0},
        "copy": True,
    }


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("weather", {}, "weather: argument `city` is missing; expected `city` (string), "),
        ("weather", {"city": 3}, "weather: argument `city` is a number; expected a string."),
        ("weather", {"city": "a", "days": "2"}, "weather: argument `days` is a string; expected a whole number."),
        ("weather", {"city": "a", "days": 9}, "weather: argument `days`: 9 is greater than the maximum of 7."),
        ("weather", {"city": "a", "when": "soon"}, "weather: argument `when`: Input should be a valid date"),
        ("route", {"places": [{}], "weights": {}}, "route: argument `places[0]`: 'name' is a required property."),
        ("later", {"seconds": float("nan")}, "later: argument `seconds`: Input should be a finite number."),
    ],
)
def test_wrong_arguments_are_told_in_words(tool, name, arguments, said):
    refused = tool(name, **arguments)
    assert not refused.ok and refused.text.startswith(said)
    assert "pydantic" not in refused.text and "\n" not in refused.text


# What comes back


def test_text_images_and_json_come_back(tool):
    painted = tool("paint", colour="red", size=[5, 4])
    assert painted.ok and painted.text == 'painted\n{"size":[5,4]}'
    assert [image.getpixel((0, 0)) for image in painted.images] == [(255, 0, 0)] * 2
    assert tool("give", kind="none").text == "(no output)"
    assert tool("give", kind="text").text == "grüße 漢"
    assert tool("give", kind="half").text == "a?b"
    assert tool("give", kind="list").text == '["a","b"]'
    assert tool("give", kind="dataclass").text == '{"total":Infinity,"parts":[{"x":1,"y":0}]}'
    assert tool("give", kind="numpy").text == '{"mean":1.5,"all":[0,1,2]}'
    shown = tool("give", kind="image")
    assert shown.text == "" and shown.images[0].getpixel((0, 0)) == (255, 255, 255)


def test_what_comes_back_is_bounded(tool):
    found = tool("give", kind="observation")
    assert not found.ok and len(found.images) == 4 and found.images[0].mode == "RGB"
    cut, note = (
        f"{'x' * 500}\n[… 9000 characters cut …]\n{'x' * 500}",
        "[5 more images are left out: one call returns 4 at most.]",
    )
    assert found.text == f"{cut}\n{note}"
    assert tool("give", kind="images").text == "[1 more images are left out: one call returns 4 at most.]"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fail", {"how": ""}, "[fail failed: KeyError: 'nothing']"),
        ("fail", {"how": "exit"}, "[fail failed: SystemExit: bye]"),
        ("fail", {"how": "time"}, "[fail failed: TimeoutError: the other side is slow]"),
        ("give", {"kind": "thing"}, "[give failed: PydanticSerializationError: "),
    ],
)
def test_what_is_raised_is_an_observation(tool, name, arguments, said):
    failed = tool(name, **arguments)
    assert not failed.ok and not failed.lost
    assert failed.text.startswith(said) and "Traceback" not in failed.text


def test_what_is_raised_is_bounded(tool):
    assert len(tool("fail", how="long").text) < 600


# Time


def test_a_function_that_is_late_is_given_up(tool):
    my_tools.release.clear()
    begun = time.monotonic()
    late = tool("hang")
    assert 0.4 < time.monotonic() - begun < 3
    assert not late.ok and late.text == "[hang failed: it did not answer within 0.5 s]"
    my_tools.release.set()
    assert tool("hang").text == "released"


def test_a_coroutine_that_is_late_is_cancelled(tool):
    assert tool("later", seconds=0.01).text == "waited"
    assert tool("later", seconds=66).text == "[later failed: it did not answer within 0.5 s]"
    deadline = time.monotonic() + 10
    while "66" not in my_tools.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "66" in my_tools.cancelled


def test_functions_that_hang_do_not_fill_the_process_with_threads(box):
    """Those that were given up are counted, and it is called again when they come back."""
    with ToolBox(replace(CONFIG, functions=(f"{MODULE}:hang",), timeout_seconds=0.01)) as hanging:
        my_tools.release.clear()
        tool = asker(hanging)
        texts = [tool("hang").text for _ in range(CONFIG.workers + LEFT_BEHIND + 3)]
        assert texts[-4].endswith("within 0.01 s]")
        assert texts[-3:] == [f"[hang failed: {LEFT_BEHIND} earlier calls have not come back yet]"] * 3
        my_tools.release.set()
        deadline = time.monotonic() + 10
        while "earlier" in tool("hang").text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "earlier" not in tool("hang").text


def test_calls_run_at_a_time(box):
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: asker(box)("nap").text, range(8))) == ["0.3"] * 8
    assert time.monotonic() - begun < 2  # one after the other they would take 2.4 s


# What can not be a tool


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("weather", "tools.functions holds 'weather'; expected module:name or file.py:name"),
        ("no_such_module_7f:f", "there is no module no_such_module_7f, neither installed nor in "),
        (f"{MODULE}.more:f", f"there is no module {MODULE}.more"),
        ("tools/no_such_file.py:f", "there is no file "),
        (f"{MODULE}:rain", f"{MODULE} has no rain"),
        ("tests.tools.my_broken_tools:f", "importing it failed: RuntimeError: no luck today"),
        (f"{MODULE}:NUMBER", "is of type int; expected a function"),
        (f"{MODULE}:Point", "is a class; expected a function"),
        (f"{MODULE}:no_docstring", "has no docstring; expected one that tells the policy what it does"),
        (f"{MODULE}:no_hint", "has no type hint for a; expected one for each argument"),
        (f"{MODULE}:many", "takes *numbers: 'int', which the policy can not name"),
        (f"{MODULE}:rest", "takes **numbers: 'int', which the policy can not name"),
        (f"{MODULE}:by_place", "takes number: 'int', which the policy can not name"),
        (f"{MODULE}:unknown_type", "has an argument that JSON can not express: "),
        (f"{MODULE}:unresolved", "has type hints that do not resolve: NameError: name 'NoSuchType' is not defined"),
        (f"{MODULE}:strange", "is called 'größe'; expected a name of 1 to 64 letters, digits, _, . and -"),
        (f"{MODULE}:double", "has the name 'weather', and so does another tool"),
        (f"{MODULE}:search", "has the name 'search', which is short for text_search"),
    ],
)
def test_what_can_not_be_a_tool_is_one_line(path, words):
    with pytest.raises(ConfigError) as caught:
        ToolBox(replace(CONFIG, functions=(f"{MODULE}:weather", path)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("tools.functions")


def test_a_file_is_a_module_once(tmp_path, monkeypatch):
    source = "loads = globals().get('loads', 0) + 1\n"
    for name in ("one", "two"):
        source += f'\ndef {name}(a: "int") -> int:\n    """Counts."""\n    return loads\n'
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with ToolBox(replace(CONFIG, functions=("mine.py:one", f"{tmp_path}/mine.py:two"))) as box:
        tool = asker(box)
        assert tool("one", a=1).text == tool("two", a=1).text == "1"


def test_modules_are_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_7f3a.py").write_text('def one(a: int) -> int:\n    """Adds."""\n    return a + 1\n')
    monkeypatch.chdir(tmp_path)
    with ToolBox(replace(CONFIG, functions=("mine_7f3a:one",))) as box:
        assert asker(box)("one", a=1).text == "2"
