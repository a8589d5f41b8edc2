"""How the policy asks for a tool, and what a tool is."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match

from hdpo_jax.types import Observation, ToolCall

TOOL_CALL_START, TOOL_CALL_END = "<tool_call>", "</tool_call>"
ALIASES = {"search": "text_search"}
"""Names that a policy may use for a tool, beside the tool's own."""

Schema = Mapping[str, Any]
"""A tool as system prompts describe it: JSON of a function's name, description and parameters."""


def _schema(name: str, description: str, properties: Mapping[str, str]) -> Schema:
    parameters = {
        "type": "object",
        "properties": {key: {"type": "string", "description": text} for key, text in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


PYTHON_SCHEMA = _schema(
    "python",
    "Runs Python code in a stateful interpreter. image_1, image_2, … hold the original images as PIL images; numpy, "
    "PIL, matplotlib and math are imported. Returns what the code prints and every image that it shows: by plt.show(), "
    "by display(image), or as the value of the last expression. No network.",
    {"code": "The code to run."},
)
TEXT_SEARCH_SCHEMA = _schema(
    "text_search",
    "Searches the web. Returns up to 10 results: title, link, snippet.",
    {"query": "What to search for."},
)
IMAGE_SEARCH_SCHEMA = _schema(
    "image_search",
    "Looks the question's image up on the web. Returns up to 10 titles of pages that show it, each with a thumbnail.",
    {},
)
SCHEMAS = {"python": PYTHON_SCHEMA, "text_search": TEXT_SEARCH_SCHEMA, "image_search": IMAGE_SEARCH_SCHEMA}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a trajectory is about, as far as tools may know: never what is right."""

    images: Sequence[bytes] = ()
    """The prompt's original image files."""
    keys: Sequence[str] = ()
    """Names under which data sets know the prompt, the likeliest first."""


class ToolSession(Protocol):
    """A tool as one trajectory sees it."""

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        """Answers one call. Never raises for what the policy wrote: the observation says what was wrong."""
        ...

    def close(self) -> None:
        """Frees all that the trajectory holds; further calls are errors."""
        ...


class Tool(Protocol):
    """Something that trajectories can call; `open` is cheap, since most trajectories never do."""

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> Schema: ...

    def open(self, subject: Subject) -> ToolSession: ...

    def close(self) -> None: ...


class TrajectoryTools(Protocol):
    """All tools as one trajectory sees them."""

    def call(self, call: ToolCall, /) -> Observation:
        """Answers any call; what is wrong with it is in the text. Calls come one at a time."""
        ...

    def close(self) -> None:
        """Frees all that the trajectory holds."""
        ...


class Tools(Protocol):
    """The tools of a run: in this process, or on servers."""

    @property
    def workers(self) -> int:
        """Calls that may run at a time."""
        ...

    @property
    def schemas(self) -> Sequence[Schema]:
        """As a chat template's system prompt takes them."""
        ...

    def session(self, images: Sequence[bytes], keys: Sequence[str] = ()) -> TrajectoryTools:
        """One trajectory's tools. `images`: the prompt's original files. `keys`: names that data sets have for it."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> "Tools": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


_CALLS = re.compile(f"{TOOL_CALL_START}(.*?)(?:{TOOL_CALL_END}|$)", re.DOTALL)


def parse_tool_call(turn_text: str) -> ToolCall | None:
    """The last tool call of an assistant turn; None when there is none.

    The closing tag may be missing: generation stops at it. A malformed call has `error`, in words for the policy.
    """
    bodies = _CALLS.findall(turn_text)
    if not bodies:
        return None
    body = bodies[-1].strip()
    if not body:
        return _malformed("it is empty")
    try:
        # Not strict: line breaks inside of strings are how models write code.
        request = json.loads(body, strict=False)
    except json.JSONDecodeError as error:
        return _malformed(f"it is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except (ValueError, RecursionError):
        return _malformed("it is not valid JSON: a number or a nesting is too large")
    if not isinstance(request, dict):
        return _malformed(f"it is {_kind(request)}, not an object")
    name = request.get("name")
    if not isinstance(name, str) or not name:
        found = f"`name` is {_kind(name)}" if "name" in request else "`name` is missing"
        return _malformed(f"{found}; it must be a string")
    arguments = request.get("arguments", {})
    if not isinstance(arguments, dict):
        return _malformed(f"`arguments` is {_kind(arguments)}, not an object", name)
    return ToolCall(name=ALIASES.get(name, name), arguments=arguments)


def argument_error(schema: Schema, arguments: Mapping[str, Any]) -> str | None:
    """What keeps arguments from fitting a tool's schema, in words for the policy; None when they fit."""
    function = schema["function"]
    name, parameters = function["name"], function["parameters"]
    error = best_match(Draft202012Validator(parameters).iter_errors(arguments))
    return None if error is None else f"{name}: {_misfit(error, parameters)}."


def _misfit(error: ValidationError, parameters: Mapping[str, Any]) -> str:
    properties = parameters.get("properties", {})
    kinds = {key: kind if isinstance(kind := rule.get("type"), str) else "any" for key, rule in properties.items()}
    everything = ", ".join(f"`{key}` ({kind})" for key, kind in kinds.items()) or "no arguments"
    given: Any = error.instance
    if error.path:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)
        expected = error.validator_value
        if error.validator == "type":
            return f"argument `{place[1:]}` is {_kind(given)}; expected {_KINDS.get(str(expected), expected)}"
        return f"argument `{place[1:]}`: {error.message[:200]}"
    if error.validator == "required":
        missing = next(key for key in cast(Sequence[str], error.validator_value) if key not in given)
        return f"argument `{missing}` is missing; expected {everything}"
    if error.validator == "additionalProperties" and error.schema is parameters:
        unknown = next(key for key in given if key not in properties)
        return f"unknown argument `{unknown[:50]}`; expected {everything}"
    return f"{error.message[:200]}; expected {everything}"


def _malformed(reason: str, name: str = "") -> ToolCall:
    form = f'{TOOL_CALL_START}{{"name": …, "arguments": {{…}}}}{TOOL_CALL_END}'
    return ToolCall(name=name, arguments={}, error=f"The tool call is malformed: {reason}. Expected {form}.")


_KINDS = {
    "null": "null",
    "boolean": "a boolean",
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "array": "an array",
    "object": "an object",
}
"""The types of JSON schemas, in the words of errors."""


def _kind(value: object) -> str:
    """A JSON value's type, in the words of JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"
