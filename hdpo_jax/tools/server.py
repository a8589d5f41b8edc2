"""`hdpo serve-tools`: runs tools for trajectories that are sampled elsewhere, over HTTP.

The format is that of wire.py, at /get_observation; beside it are /health, /metrics (Prometheus) and /tools (schemas).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import ValidationError

from hdpo_jax.config import ConfigError, ToolsConfig, ToolServerConfig
from hdpo_jax.http_server import Guard, serve, token_for
from hdpo_jax.tools.protocol import Schema, Tools, argument_error, parse_tool_call
from hdpo_jax.tools.server_metrics import ServerMetrics
from hdpo_jax.tools.sessions import Answer, Busy, Order, Pending, Sessions
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.tools.wire import (
    PATH,
    TOKEN,
    ActionBatch,
    ExtraFields,
    Health,
    ObservationBatch,
    ObservationMessage,
    image_file,
    problem,
)
from hdpo_jax.types import ToolCall

CLIENT_GONE = 499
"""What logs call an answer that nobody waited for."""


def serve_tools(tools: ToolsConfig, config: ToolServerConfig, *, host: str, port: int) -> None:
    """Serves until SIGTERM. Raises ConfigError, one line, where that is not safe or the tools do not work here."""
    if tools.servers:
        raise ConfigError("tools.servers is set; expected a server to run its tools itself: leave it empty")
    token = token_for(host, TOKEN)
    with ToolBox(tools) as toolbox:
        serve(tool_server(toolbox, config, token), host=host, port=port, drain_seconds=config.drain_seconds)


def tool_server(tools: Tools, config: ToolServerConfig, token: str | None = None) -> Guard:
    """The ASGI application; `tools` stay the caller's to close."""
    service = _Service(tools, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.sessions.start()
        yield
        await service.sessions.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route(PATH, service.observe, methods=["POST"])
    app.add_api_route("/tools", service.schemas)
    app.add_api_route("/metrics", service.page)

    @app.get("/health")
    async def health(response: Response) -> Health:
        response.status_code = 503 if guard.draining else 200
        return service.health("draining" if guard.draining else "ready")

    guard = Guard(
        app,
        token=token,
        requests=config.requests,
        body_bytes=config.body_mb * 2**20,
        on_answer=service.heard,
    )
    return guard


class _Service:
    """Between HTTP and sessions."""

    def __init__(self, tools: Tools, config: ToolServerConfig):
        self._config = config
        self._schemas = {schema["function"]["name"]: schema for schema in tools.schemas}
        self.sessions = Sessions(tools, config, self._count)
        self.metrics = ServerMetrics(lambda: self.sessions.open, lambda: self.sessions.waiting)

    async def observe(self, request: Request) -> Response:
        started = time.perf_counter()
        try:
            batch = ActionBatch.model_validate_json(await request.body())
            orders = {place: self._order(batch, place, call) for place, call in self._calls(batch).items()}
        except ValidationError as error:
            raise HTTPException(422, problem(error)) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        try:
            pending = dict(zip(orders, self.sessions.submit(list(orders.values())), strict=True))
        except Busy as busy:
            raise HTTPException(429, str(busy), {"Retry-After": "1"}) from None
        # A trajectory that ends here ends after its own calls.
        over = set(_finished(batch))
        ends = filter(None, [self.sessions.finish(batch.trajectory_ids[place]) for place in over])
        answers = await _answers(request, pending, [place for place, order in orders.items() if order.name is None])
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        await asyncio.gather(*ends)
        messages = [
            _message(answers[place]) if place in answers else _nothing(over=place in over)
            for place in range(len(batch.actions))
        ]
        content = ObservationBatch(
            observations=list(messages),
            dones=[place in over for place in range(len(messages))],
            valids=[place in over or place in orders and orders[place].valid for place in range(len(messages))],
            processing_time_ms=1000 * (time.perf_counter() - started),
        )
        return Response(content.model_dump_json(), media_type="application/json")

    async def schemas(self) -> list[Schema]:
        return list(self._schemas.values())

    async def page(self) -> Response:
        return Response(self.metrics.page(), media_type=self.metrics.media_type)

    def health(self, status: str) -> Health:
        sessions = self.sessions
        return Health(
            status=status, sessions=sessions.open, queue=sessions.waiting, tools=list(self._schemas), call_ids=True
        )

    def heard(self, path: str, status: int) -> None:
        if path == PATH:
            self.metrics.count_request(status)

    def _calls(self, batch: ActionBatch) -> dict[int, ToolCall]:
        """What is to be run, by its place. Raises ValueError where there is too much."""
        if len(batch.actions) > self._config.actions:
            raise ValueError(f"there are {len(batch.actions)} actions; expected {self._config.actions} at most")
        over = set(_finished(batch))
        parsed = ((place, parse_tool_call(action)) for place, action in enumerate(batch.actions) if place not in over)
        return {place: call for place, call in parsed if call is not None}

    def _order(self, batch: ActionBatch, place: int, call: ToolCall) -> Order:
        """Raises ValueError where the images are not what they should be."""
        trajectory = batch.trajectory_ids[place]
        extra = (batch.extra_fields[place] if batch.extra_fields else None) or ExtraFields()
        images: Sequence[str] = extra.images or ()
        if len(images) > self._config.images:
            raise ValueError(f"extra_fields[{place}] has {len(images)} images; expected {self._config.images} at most")
        if trajectory in self.sessions:
            images = ()  # it has them, and many trainers send them with every call
        files = []
        for number, image in enumerate(images):
            try:
                files.append(image_file(image, self._config.image_mb * 2**20))
            except ValueError as error:
                raise ValueError(f"extra_fields[{place}].images[{number}] {error}") from None
        name = batch.call_ids[place] if batch.call_ids else None
        return Order(
            trajectory=trajectory,
            call=call,
            images=files,
            keys=extra.names(),
            opened=extra.opened,
            name=name,
            valid=self._fits(call),
        )

    def _fits(self, call: ToolCall) -> bool:
        """Whether a tool has something to run."""
        schema = self._schemas.get(call.name)
        return call.error is None and schema is not None and argument_error(schema, call.arguments) is None

    def _count(self, order: Order, answer: Answer) -> None:
        tool = order.call.name if order.call.name in self._schemas else "unknown"
        self.metrics.count_call(tool, answer, valid=order.valid)


def _finished(batch: ActionBatch) -> Iterator[int]:
    return (place for place, over in enumerate(batch.finish or ()) if over)


async def _answers(request: Request, pending: dict[int, Pending], unnamed: Sequence[int]) -> dict[int, Answer] | None:
    """None where the client went away: then calls that have not begun do not, unless it may ask for them again."""
    answering = asyncio.gather(*(one.answer() for one in pending.values()))
    leaving = asyncio.ensure_future(_left(request))
    await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if answering.done():
        return dict(zip(pending, answering.result(), strict=True))
    answering.cancel()
    for place in unnamed:
        pending[place].abandon()
    return None


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _message(answer: Answer) -> ObservationMessage:
    metrics = {"ok": answer.ok, "lost": answer.lost, "seconds": round(answer.seconds, 4)}
    return ObservationMessage(obs=answer.text, image=list(answer.images), metrics=metrics, timeout=answer.timed_out)


def _nothing(*, over: bool) -> ObservationMessage:
    """What comes back where there was no call to run: no text, as from the authors' server."""
    return ObservationMessage(obs="", metrics={} if over else {"invalid_reason": "there is no tool call in the action"})
