"""`hdpo serve`: `/v1/models` and `/v1/chat/completions` in OpenAI's format, on the rollout engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from hdpo_jax.rollout.prompts import Question
from hdpo_jax.serve.chat_format import (
    ChatRequest,
    Reply,
    RequestError,
    error_record,
    split_calls,
    token_record,
    usage,
)
from hdpo_jax.serve.exchange import Exchange, Told, Wish
from hdpo_jax.serve.service import Busy, Closed, Service
from hdpo_jax.serve.text_stream import overlap
from hdpo_jax.tools.protocol import TOOL_CALL_START
from hdpo_jax.tools.system_prompt import told_of_tools
from hdpo_jax.types import Prompt, StopReason

T = TypeVar("T")

FINISH = {
    StopReason.END_OF_TURN: "stop",
    StopReason.CUT: "stop",
    StopReason.TOKEN_BUDGET: "length",
    StopReason.CALL_LIMIT: "length",
}


class ToolsLost(RuntimeError):
    """The tools that an answer needed are gone."""


def make_app(service: Service, name: str, *, system_prompt: str | None = None) -> FastAPI:
    """The application. `name`: the model's.

    `system_prompt`: of an agent whose tools run here, for requests without one; None: tools are the client's.
    """
    app = FastAPI(title="hdpo", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> JSONResponse:
        state = "ready" if service.alive else "failed"
        counts = {"running": service.running, "waiting": service.waiting}
        return JSONResponse({"status": state, **counts}, 200 if service.alive else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        one = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "hdpo",
            "max_model_len": service.rollout.capacity,
        }
        return {"object": "list", "data": [one]}

    @app.post("/v1/chat/completions")
    async def complete(asked: ChatRequest, request: Request) -> Any:
        if asked.model not in (None, name):
            return _refusal(404, f"there is no model {asked.model[:80]!r} here; expected {name!r}", "model")
        asked.check()
        prompt = asked.prompt() if system_prompt is None else _for_agent(asked, system_prompt)
        question = await anyio.to_thread.run_sync(_question, service, prompt)
        exchange = Exchange(service, question, _wish(asked, service))
        exchange.begin()
        answer = _Answer(asked, exchange, Reply(name), agent=system_prompt is not None)
        if asked.stream:
            return StreamingResponse(answer.parts(), media_type="text/event-stream")
        try:
            whole = await _unless_gone(request, answer.whole())
        finally:
            exchange.leave()
        return JSONResponse(whole) if whole else JSONResponse({}, 499)

    @app.exception_handler(RequestError)
    async def wrong(_: Request, error: RequestError) -> JSONResponse:
        return _refusal(400, str(error), error.param)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return _refusal(400, f"{place or 'the body'}: {first['msg']}", place or None)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return _refusal(429, str(error))

    @app.exception_handler(Closed)
    async def closed(_: Request, error: Closed) -> JSONResponse:
        return _refusal(503, str(error))

    @app.exception_handler(ToolsLost)
    async def lost(_: Request, error: ToolsLost) -> JSONResponse:
        return _refusal(502, str(error))

    return app


def _question(service: Service, prompt: Prompt) -> Question:
    """Raises RequestError where the prompt can not be asked."""
    try:
        return service.question(prompt)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: half of a surrogate pair, which is no text
        raise RequestError(" ".join(str(error).split())[:500], "messages") from error


def _wish(asked: ChatRequest, service: Service) -> Wish:
    most = service.agent.max_response_tokens
    return Wish(
        choices=asked.n,
        most_tokens=min(asked.most_tokens or most, most),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=max(asked.top_k or 0, 0),
        top_p=asked.top_p or 1.0,
        min_p=asked.min_p or 0.0,
        seed=asked.seed,
        stops=asked.stops,
    )


def _for_agent(asked: ChatRequest, system_prompt: str) -> Prompt:
    if asked.offered:
        raise RequestError("tools beside those that run here; leave them out, or ask a server without --agent", "tools")
    prompt = asked.prompt()
    return replace(prompt, messages=told_of_tools(prompt.messages, system_prompt))


@dataclass
class _Choice:
    """What one choice has come to."""

    text: str = ""
    """Of the turn under way."""
    sent: int = 0
    """Characters of it that a stream has sent."""
    tokens: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    """Of an agent: all of them, tools' included."""
    stop: StopReason | None = None


class _Answer:
    """Makes answers, whole or in parts, of what an exchange tells."""

    def __init__(self, asked: ChatRequest, exchange: Exchange, reply: Reply, *, agent: bool):
        self._asked = asked
        self._exchange = exchange
        self._reply = reply
        self._agent = agent
        self._choices = [_Choice() for _ in range(asked.n)]

    async def whole(self) -> dict[str, Any]:
        async for told in self._exchange:
            self._take(told)
        return self._reply.whole(map(self._finished, range(len(self._choices))), self._usage())

    async def parts(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            for number in range(len(self._choices)):
                yield self._event(number, {"role": "assistant", "content": ""})
            async for told in self._exchange:
                fresh = self._take(told)
                for delta in self._deltas(told):
                    yield self._event(told.choice, delta, fresh)
                    fresh = []
                if told.stop is not None:
                    yield self._event(told.choice, {}, fresh, self._finish_reason(told.choice))
            if self._asked.stream_options and self._asked.stream_options.include_usage:
                yield _event(self._reply.part([], self._usage()))
            yield "data: [DONE]\n\n"
        except (Closed, ToolsLost) as error:
            yield _event(error_record(str(error), "server_error"))
        finally:
            self._exchange.leave()

    def _take(self, told: Told) -> list[dict[str, Any]]:
        """Adds what was told to its choice; the records of its tokens, where they are wanted."""
        choice = self._choices[told.choice]
        if told.stop is StopReason.DROPPED:
            raise ToolsLost("the tools that this answer needed are gone")
        choice.text += told.text
        choice.tokens += len(told.tokens)
        choice.stop = told.stop
        fresh = self._records(told) if self._asked.logprobs else []
        choice.records += fresh
        if told.turn and self._agent:
            choice.turns.append({"role": told.turn.role, "content": told.turn.text})
            choice.text = ""
        return fresh

    def _records(self, told: Told) -> list[dict[str, Any]]:
        processor = self._exchange.service.policy.processor
        pairs = zip(told.tokens, told.logprobs, strict=True)
        return [token_record(processor.decode([token], keep_special=True), logprob) for token, logprob in pairs]

    def _deltas(self, told: Told) -> list[dict[str, Any]]:
        """What to say of a choice now. An agent's turns are said when they end, all but the last as thoughts."""
        choice = self._choices[told.choice]
        if self._agent:
            return self._agent_deltas(choice)
        if not self._asked.offered:
            ready = len(choice.text)
        elif told.stop is not None:
            said, calls = split_calls(choice.text, self._asked.offered)
            left = said[choice.sent :]
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            return [{"content": left}] * bool(left) + [{"tool_calls": numbered}] * bool(calls)
        else:
            # What may be a call is held back until it is known to be one.
            place = choice.text.find(TOOL_CALL_START)
            ready = place if place >= 0 else len(choice.text) - overlap(choice.text, TOOL_CALL_START)
        fresh = choice.text[choice.sent : ready]
        choice.sent = max(choice.sent, ready)
        return [{"content": fresh}] if fresh else []

    def _agent_deltas(self, choice: _Choice) -> list[dict[str, Any]]:
        ended = choice.turns if choice.stop is not None else choice.turns[:-1]
        fresh, choice.sent = ended[choice.sent :], len(ended)
        last = len(fresh) - 1 if choice.stop is not None else len(fresh)
        return [
            {"content" if number == last else "reasoning_content": turn["content"]} for number, turn in enumerate(fresh)
        ]

    def _finished(self, number: int) -> dict[str, Any]:
        choice = self._choices[number]
        message: dict[str, Any] = {"role": "assistant"}
        if self._agent:
            message |= {"content": choice.turns[-1]["content"], "turns": choice.turns}
        else:
            said, calls = split_calls(choice.text, self._asked.offered) if self._asked.offered else (choice.text, [])
            message |= {"content": said} | ({"tool_calls": calls} if calls else {})
        finish = self._finish_reason(number)
        logprobs = {"content": choice.records} if self._asked.logprobs else None
        return {"index": number, "message": message, "finish_reason": finish, "logprobs": logprobs}

    def _finish_reason(self, number: int) -> str:
        choice = self._choices[number]
        assert choice.stop is not None
        if self._asked.offered and split_calls(choice.text, self._asked.offered)[1]:
            return "tool_calls"
        return FINISH[choice.stop]

    def _usage(self) -> dict[str, int]:
        return usage(len(self._exchange.question.token_ids), sum(choice.tokens for choice in self._choices))

    def _event(
        self, number: int, delta: dict[str, Any], records: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> str:
        logprobs = {"content": records} if records else None
        choice = {"index": number, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return _event(self._reply.part([choice]))


def _event(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record)}\n\n"


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T | None:
    """The answer; None where whoever asked has gone away before."""
    asking = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait([asking, leaving], return_when=asyncio.FIRST_COMPLETED)
        return asking.result() if asking.done() else None
    finally:
        asking.cancel()
        leaving.cancel()


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _refusal(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 429 else "server_error"
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_record(message, kind, param), status, headers=headers)
