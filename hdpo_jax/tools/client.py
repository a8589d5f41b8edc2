"""Tools on servers: what `tools.servers` names, in place of tools in this process.

A trajectory keeps the server of its first call, since its variables are there. What is not answered is sent again under
the same name, so that it runs once. A server of the authors' release knows no names: there, only what certainly was not
run is sent again.
"""

import json
import logging
import queue
import random
import threading
import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools.protocol import SCHEMAS, TOOL_CALL_END, TOOL_CALL_START, Schema
from hdpo_jax.tools.servers import Refused, Server, Servers, Unanswered
from hdpo_jax.tools.wire import ObservationBatch, data_uri, decoded_image, observed, succeeded, without_marks
from hdpo_jax.types import Observation, ToolCall

FINISHERS = 4
"""Threads that tell servers which trajectories are over."""
FINISH_SECONDS = 10.0
"""How long one is told; after that, it frees them by itself when they have been idle for long."""
PAUSE = 0.5
"""Before a trajectory that has called nobody yet looks for a server again, where none had room."""
PATIENCE = 5.0
"""How long the end of a run waits for that."""
MAX_IMAGE_BYTES = 64 * 2**20
AFRESH = "[The tools were started afresh: all variables of earlier calls are lost.]"

logger = logging.getLogger(__name__)


class RemoteToolBox:
    """Stands for a ToolBox whose tools run on servers.

    Raises ConfigError, one line, when no server answers or one refuses the token.
    """

    def __init__(self, config: ToolsConfig):
        self.workers = config.workers
        """Calls that may run at a time."""
        self.config = config
        connections = config.workers + FINISHERS
        self.servers = Servers(config.servers, connections=connections, patience=config.lost_seconds)
        self._finished: queue.SimpleQueue[tuple[Server, str] | None] = queue.SimpleQueue()
        self._finishers = [threading.Thread(target=self._finish, daemon=True) for _ in range(FINISHERS)]
        for thread in self._finishers:
            thread.start()

    @property
    def schemas(self) -> list[Schema]:
        """The servers' tools, as a chat template's system prompt takes them."""
        if self.servers.schemas is not None:
            return self.servers.schemas
        return [SCHEMAS[name] for name in self.config.names if name in SCHEMAS]

    def session(self, images: Sequence[bytes], keys: Sequence[str] = ()) -> "RemoteSession":
        """One trajectory's tools. No server hears of it before its first call."""
        return RemoteSession(self, images, keys)

    def finish(self, server: Server, trajectory: str) -> None:
        """Has the server told that a trajectory is over; does not wait."""
        self.servers.give_back(server)
        self._finished.put((server, trajectory))

    def close(self) -> None:
        for _ in self._finishers:
            self._finished.put(None)
        until = time.monotonic() + PATIENCE
        for thread in self._finishers:
            thread.join(max(0.0, until - time.monotonic()))
        self.servers.close()

    def __enter__(self) -> "RemoteToolBox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self) -> None:
        while (told := self._finished.get()) is not None:
            server, trajectory = told
            # One at a time: the authors' server sends a request to the worker of its first trajectory.
            over = {"trajectory_ids": [trajectory], "actions": [""], "extra_fields": [{}]}
            body = json.dumps(over | {"finish": [True], "is_last_step": [True]}).encode()
            try:
                server.ask(body, until=time.monotonic() + FINISH_SECONDS, patience=0.0)
            except (Unanswered, Refused, RuntimeError) as error:
                logger.debug("%s was not told that a trajectory is over: %s", server.name, error)


class RemoteSession:
    """What a trajectory calls."""

    def __init__(self, box: RemoteToolBox, images: Sequence[bytes], keys: Sequence[str]):
        self._box = box
        self._images = images
        self._keys = keys
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server: Server | None = None
        self._trajectory = uuid.uuid4().hex
        self._opened = False
        """Whether the server has answered a call, and so holds its state."""
        self._afresh = False
        """Whether state was lost that the policy may count on."""

    def call(self, call: ToolCall) -> Observation:
        """Answers any call. Where no server does, as tools.on_lost says."""
        if call.error is not None:
            return Observation(text=call.error, ok=False)
        try:
            with self._lock:
                return self._answer(call)
        finally:
            if self._closed.is_set():
                # It ended during the call, and whoever ended it did not wait.
                self.close()

    def close(self) -> None:
        """Ends the trajectory; does not wait for the server to hear of it."""
        self._closed.set()
        if self._lock.acquire(blocking=False):
            try:
                self._leave()
            finally:
                self._lock.release()

    def _answer(self, call: ToolCall) -> Observation:
        try:
            return self._observation(self._ask(call))
        except Unanswered as error:
            return self._lost(str(error))
        except Refused as error:
            return self._refused(error)

    def _ask(self, call: ToolCall) -> ObservationBatch:
        config, name = self._box.config, uuid.uuid4().hex
        until = time.monotonic() + config.server_seconds
        lost = time.monotonic() + config.lost_seconds
        while True:
            server = self._server = self._server or self._box.servers.take()
            try:
                return self._ask_server(server, call, name, until)
            except Unanswered as error:
                # Without state there, nothing is lost by going elsewhere; but a call that ran is not run once more.
                ran = error.may_have_run and not server.repeats
                if self._opened or ran or self._closed.is_set() or time.monotonic() >= (until if error.busy else lost):
                    raise
                self._start_afresh()
                if error.busy or not self._box.servers.any_untroubled:
                    self._closed.wait(random.uniform(0.5, 1.0) * PAUSE)

    def _ask_server(self, server: Server, call: ToolCall, name: str, until: float) -> ObservationBatch:
        if self._closed.is_set():
            raise Unanswered("the trajectory has ended")
        answer = server.ask(
            json.dumps(self._request(server, call, name)).encode(),
            until=until,
            patience=self._box.config.lost_seconds,
            loyal=self._opened,
            wait=self._closed.wait,
            over=self._closed.is_set,
        )
        if len(answer.observations) != 1:
            raise Refused(f"{len(answer.observations)} observations for one action", 200)
        return answer

    def _request(self, server: Server, call: ToolCall, name: str) -> dict[str, Any]:
        written = json.dumps({"name": call.name, "arguments": call.arguments})
        # Whatever the arguments hold, they do not hold the end of the call.
        action = f"{TOOL_CALL_START}{written.replace('<', chr(92) + 'u003c')}{TOOL_CALL_END}"
        request = {
            "trajectory_ids": [self._trajectory],
            "actions": [action],
            "finish": [False],
            "is_last_step": [False],
        }
        if server.repeats:
            images = {} if self._opened else {"images": [data_uri(image) for image in self._images]}
            extra = {"keys": list(self._keys), "opened": self._opened, **images}
            return request | {"extra_fields": [extra], "call_ids": [name]}
        # The authors' server wants the images whenever it starts an interpreter again, and knows questions by "index".
        index = {"index": self._keys[0]} if self._keys else {}
        return request | {"extra_fields": [{"images": [data_uri(image) for image in self._images], **index}]}

    def _observation(self, batch: ObservationBatch) -> Observation:
        server, message = self._server, observed(batch.observations[0])
        assert server is not None
        drops = self._box.config.on_lost == "drop"
        if message.metrics.get("lost") is True:
            self._start_afresh()
            return Observation(text=message.obs, ok=False, lost=drops)
        self._opened = True
        text = message.obs if server.repeats else without_marks(message.obs, message.image)
        images, notes = [], [AFRESH] if self._afresh else []
        self._afresh = False
        most = self._box.config.max_images
        left_out = []
        for uri in message.image[:most]:
            try:
                images.append(decoded_image(uri, MAX_IMAGE_BYTES))
            except ValueError as error:
                left_out.append(f"[An image is left out: it {error}.]")
        if len(message.image) > most:
            more = len(message.image) - most
            left_out.append(f"[{more} more images are left out: one call returns {most} at most.]")
        return Observation(
            text="\n".join([*notes, text, *left_out]) if notes or left_out else text,
            images=images,
            ok=succeeded(batch.valids[0], message.metrics),
            timed_out=message.timeout,
        )

    def _lost(self, reason: str) -> Observation:
        """The server is gone."""
        held = self._opened
        if not self._closed.is_set():
            logger.warning("a tool server does not answer: %s", reason)
        self._start_afresh()
        said = "The tool server was lost, and with it all variables" if held else "No tool server answers"
        text = f"[{said}. This call has no result; the next one starts afresh.]"
        return Observation(text=text, ok=False, lost=self._box.config.on_lost == "drop")

    def _refused(self, error: Refused) -> Observation:
        """The server is there. What it refuses is ours to mend, not the policy's; where it fails, the tool did."""
        logger.warning("%s refuses a call: %s", self._server.name if self._server else "a tool server", error)
        drops = self._box.config.on_lost == "drop" and error.status != 500
        return Observation(text=f"[The tool server did not run the call: {error}]", ok=False, lost=drops)

    def _start_afresh(self) -> None:
        """The next call goes where there is room, as another trajectory."""
        self._afresh = self._afresh or self._opened
        self._leave()
        self._trajectory = uuid.uuid4().hex
        self._opened = False

    def _leave(self) -> None:
        if self._server is not None:
            self._box.finish(self._server, self._trajectory)
            self._server = None
