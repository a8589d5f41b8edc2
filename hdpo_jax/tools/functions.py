"""A tool from a plain Python function: its type hints are the schema, its docstring is the description.

    def weather(city: str, days: Annotated[int, Field(le=7)] = 1) -> str:
        \"""Says how the weather will be.

        Args:
            city: Where, in English.
        \"""

Functions run in this process, with all its rights, on arguments that the policy wrote.
"""

import asyncio
import inspect
import logging
import re
import threading
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import docstring_parser
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json

from hdpo_jax import import_paths
from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.protocol import Schema, Subject
from hdpo_jax.tools.results import LONGEST_ERROR, error_in_words, observation
from hdpo_jax.types import Observation

PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What a tool may be called."""
LEFT_BEHIND = 32
"""Calls of a function that may still run after they were given up; past that it is not called any more."""

logger = logging.getLogger(__name__)


class FunctionTool:
    """A function as a tool, called `workers` times at once or more: it has to be thread-safe.

    Arguments are checked and converted by pydantic before the call. A parameter annotated as `Subject` is not the
    policy's: it gets the prompt's images. What comes back: text, a PIL image, a list of both, an `Observation`, or
    anything else that is JSON. An exception becomes an observation that names it.

    A call that takes longer than `tools.timeout_seconds` is given up. A coroutine is cancelled then (each call has an
    event loop of its own); a plain function can not be stopped in its thread: it runs on, and what it returns is lost.
    """

    def __init__(self, path: str, config: ToolsConfig):
        """`path`: as in `tools.functions`. Raises ConfigError, one line, for what can not be a tool."""
        self._function = import_paths.load(path, "tools.functions")
        self._config = config
        self._threads = threading.BoundedSemaphore(config.workers + LEFT_BEHIND)
        signature = _Signature(self._function, path)
        self.name = signature.name
        self._subject = signature.subject
        self._arguments = signature.arguments
        self.schema: Schema = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": signature.description,
                "parameters": signature.parameters,
            },
        }

    def open(self, subject: Subject) -> "FunctionSession":
        return FunctionSession(self, subject)

    def close(self) -> None: ...

    def call(self, arguments: Mapping[str, Any], subject: Subject) -> Observation:
        """Calls the function for a trajectory about `subject`."""
        try:
            checked = self._arguments.model_validate(arguments)
        except ValidationError as error:
            return Observation(text=_misfit(self.name, error), ok=False)
        # What was not given is left to the function's own defaults.
        given = {_alias(self._arguments, field): getattr(checked, field) for field in checked.model_fields_set}
        if self._subject is not None:
            given[self._subject] = subject
        seconds = self._config.timeout_seconds
        if not self._threads.acquire(blocking=False):
            return self._failed(f"{LEFT_BEHIND} earlier calls have not come back yet")
        future: Future[Observation] = Future()
        threading.Thread(target=self._work, args=(future, given), name=self.name, daemon=True).start()
        try:
            error = future.exception(seconds)
        except TimeoutError:
            return self._failed(_late(seconds), timed_out=True)
        if error is None:
            return future.result()
        if isinstance(error, _Late):
            return self._failed(str(error), timed_out=True)
        logger.info("the %s tool failed", self.name, exc_info=error)
        return self._failed(error_in_words(error))

    def _work(self, future: Future[Observation], given: Mapping[str, Any]) -> None:
        """In a thread of its own, so that nobody waits longer than is allowed."""
        try:
            value = self._function(**given)
            if inspect.isawaitable(value):
                value = asyncio.run(_in_time(value, self._config.timeout_seconds))
            if isinstance(value, Observation):
                bounded = observation([value.text, *value.images], self._config, ok=value.ok)
                future.set_result(replace(bounded, lost=value.lost, timed_out=value.timed_out))
            else:
                future.set_result(observation(_parts(value), self._config))
        except BaseException as error:
            future.set_exception(error)
        finally:
            self._threads.release()

    def _failed(self, reason: str, *, timed_out: bool = False) -> Observation:
        return Observation(text=f"[{self.name} failed: {reason}]", ok=False, timed_out=timed_out)


class FunctionSession:
    """A function keeps no state for a trajectory."""

    def __init__(self, tool: FunctionTool, subject: Subject):
        self._tool = tool
        self._subject = subject

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        return self._tool.call(arguments, self._subject)

    def close(self) -> None: ...


class _Signature:
    """What a function's signature and docstring say of it as a tool."""

    def __init__(self, function: Any, path: str):
        self._path = path
        is_function = callable(function) and not inspect.isclass(function)
        self._require(is_function, f"is {_kind(function)}; expected a function")
        self.name = getattr(function, "__name__", "")
        plain = PLAIN_NAME.fullmatch(self.name) is not None
        self._require(plain, f"is called {self.name!r}; expected a name of 1 to 64 letters, digits, _, . and -")
        text = inspect.getdoc(function) or ""
        self._require(text.strip() != "", "has no docstring; expected one that tells the policy what it does")
        documented = docstring_parser.parse(text)
        self.description = _description(documented) or text
        self.subject: str | None = None
        """The name of the parameter that gets the prompt's images."""
        self._texts = {parameter.arg_name: parameter.description for parameter in documented.params}
        """Of arguments, by name: what the docstring says, or a text beside the type hint."""
        self.arguments = self._model(function)
        self.parameters = self._json_schema()

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ConfigError(f"tools.functions: {self._path} {problem}")

    def _model(self, function: Callable[..., Any]) -> type[BaseModel]:
        """The arguments as pydantic checks them. Fields are numbered: a parameter may have any name, such as `copy`."""
        try:
            hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
        except Exception as error:
            problem = " ".join(error_in_words(error).split())
            raise ConfigError(f"tools.functions: {self._path} has type hints that do not resolve: {problem}") from error
        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            self._require(named, f"takes {parameter}, which the policy can not name; expected arguments with a name")
            self._require(name in hints, f"has no type hint for {name}; expected one for each argument")
            if Subject in (hints[name], *typing.get_args(hints[name])):
                self.subject = name
                continue
            beside = [text for text in getattr(hints[name], "__metadata__", ()) if isinstance(text, str)]
            if beside:
                self._texts[name] = beside[-1]
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[f"argument_{len(fields)}"] = (hints[name], Field(default, alias=name))
        try:
            return create_model(self.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
        except PydanticUserError as error:
            raise self._unknown_type(error) from error

    def _json_schema(self) -> dict[str, Any]:
        try:
            schema = self.arguments.model_json_schema(schema_generator=_Untitled)
        except PydanticUserError as error:
            raise self._unknown_type(error) from error
        schema.pop("title", None)
        properties = schema.setdefault("properties", {})
        for name, text in self._texts.items():
            if text and name in properties:
                properties[name].setdefault("description", text)
        return schema

    def _unknown_type(self, error: PydanticUserError) -> ConfigError:
        reason = error.message.splitlines()[0].split(". ")[0]
        return ConfigError(f"tools.functions: {self._path} has an argument that JSON can not express: {reason}")


class _Untitled(GenerateJsonSchema):
    """Fields need no title beside their name."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _description(documented: docstring_parser.Docstring) -> str:
    returns = documented.returns.description if documented.returns else None
    parts = (documented.short_description, documented.long_description, f"Returns: {returns}" if returns else None)
    return "\n\n".join(filter(None, parts))


def _alias(model: type[BaseModel], field: str) -> str:
    alias = model.model_fields[field].alias
    assert alias is not None
    return alias


def _misfit(name: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{name}: argument `{place}`: {first['msg']}."[:LONGEST_ERROR]


def _kind(value: object) -> str:
    return "a class" if inspect.isclass(value) else f"of type {type(value).__name__}"


class _Late(Exception):
    """A coroutine was cancelled, since its time was over."""


async def _in_time(awaitable: Awaitable[Any], seconds: float) -> Any:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise _Late(_late(seconds)) from None
        raise


def _late(seconds: float) -> str:
    return f"it did not answer within {seconds:g} s"


def _parts(value: Any) -> Iterator[str | Image.Image]:
    """What a function returned, as text and images."""
    match value:
        case None:
            return
        case str() | Image.Image():
            yield value
        case list() | tuple() if any(isinstance(item, Image.Image) for item in value):
            for item in value:
                yield from _parts(item)
        case _:
            yield to_json(value, inf_nan_mode="constants", fallback=_plain).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"it returned a {type(value).__name__}; expected text, an image, a list of both, or JSON")
