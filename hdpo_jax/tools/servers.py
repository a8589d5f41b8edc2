"""Tool servers as a trainer sees them: which answer, which is least used, and asking again where one does not."""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from pydantic import TypeAdapter, ValidationError

from hdpo_jax.config import ConfigError, bearer_token
from hdpo_jax.tools.protocol import Schema
from hdpo_jax.tools.wire import PATH, TOKEN, Health, ObservationBatch

CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 5.0
AVOID_SECONDS = 5.0
"""How long a server that was in trouble is the last that is chosen."""
FULL_SECONDS = 1.0
"""The same of one that had no room."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two tries: doubled from one to the next, and drawn at random below that."""
KEEP_ALIVE_SECONDS = 4.0
"""Less than servers keep idle connections: one that they close meanwhile looks like a call that was lost."""
MAX_ANSWER = 256 * 2**20
"""Bytes of an answer that are read."""
NOT_RUN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
BUSY, LEAVING, PROXIES = 429, 503, (502, 504)

logger = logging.getLogger(__name__)


class Unanswered(Exception):
    """A server that was asked often enough, and did not answer; the message says why."""

    def __init__(self, reason: str, *, busy: bool = False, may_have_run: bool = False):
        super().__init__(reason)
        self.busy = busy
        """It is there, and has no room."""
        self.may_have_run = may_have_run
        """The call, and its answer was lost."""


class Refused(Exception):
    """A server answered that it will not, or could not."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class Server:
    """One tool server. Threads may share it."""

    def __init__(self, address: str, connections: int):
        self._url = address.rstrip("/").removesuffix(PATH)
        self.name = str(httpx.URL(self._url).copy_with(userinfo=b""))
        """For messages."""
        token = bearer_token(TOKEN)
        self._client = httpx.Client(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=KEEP_ALIVE_SECONDS),
            # A proxy for the internet, or a password of ~/.netrc, has no business here.
            trust_env=False,
        )
        self._health: Health | None = None
        self._trouble, self._avoid = 0.0, 0.0
        """When it stopped to answer, and until when it is avoided for that."""
        self._full = 0.0
        """Until when it is avoided because it had no room."""
        self.trajectories = 0
        """Of this process. Counted by Servers."""

    @property
    def troubled(self) -> bool:
        return time.monotonic() < max(self._avoid, self._full)

    @property
    def repeats(self) -> bool:
        """Whether calls have names there, so that one that is sent again runs once. Asks it where that is not known."""
        return self.health().call_ids

    def health(self) -> Health:
        """What it says of itself: asked once. Raises Unanswered."""
        if self._health is None:
            content = self._look("/health")
            try:
                self._health = Health.model_validate_json(content)
            except ValidationError:
                raise Unanswered(f"{self.name}: /health is not what tool servers say") from None
        return self._health

    def schemas(self) -> list[Schema] | None:
        """Its tools; None where servers do not tell. Raises Unanswered; ConfigError where it refuses the token."""
        if not self.repeats:
            return None
        return TypeAdapter(list[Schema]).validate_json(self._look("/tools"))

    def ask(
        self,
        body: bytes,
        *,
        until: float,
        patience: float,
        loyal: bool = True,
        wait: Callable[[float], Any] = time.sleep,
        over: Callable[[], bool] = lambda: False,
    ) -> ObservationBatch:
        """What it answers. Asks again after connection errors, 429, 502, 503 and 504, with pauses.

        Raises Refused for other errors. Raises Unanswered at the time `until`; once `over`; when the server has not
        answered anybody for `patience` seconds; where it knows no names of calls and may have run this one; and, unless
        `loyal`, where it certainly did not.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                status, after, content = self._send("POST", PATH, body, until)
            except httpx.TransportError as error:
                reason, busy, after = _words(error), False, 0.0
                not_run = isinstance(error, NOT_RUN)
            else:
                if status not in (BUSY, LEAVING, *PROXIES):
                    self._avoid = 0.0
                    return _parsed(status, content)
                reason, busy = f"HTTP {status}: {_detail(content)}", status == BUSY
                not_run = status not in PROXIES
            now = time.monotonic()
            if busy:
                self._full = now + max(after, FULL_SECONDS)
            patient = busy or now < self._fails() + patience
            may = (loyal or not not_run) and (not_run or self._known_to_repeat)
            pause = min(2 * pause, LONGEST_PAUSE)
            drawn = max(after, pause * random.uniform(0.5, 1.0))
            if not patient or not may or over() or now + drawn >= until:
                raise Unanswered(f"{self.name}: {reason}", busy=busy, may_have_run=not not_run)
            wait(drawn)

    def close(self) -> None:
        self._client.close()

    def _look(self, path: str) -> bytes:
        """What stands there. Raises Unanswered; ConfigError where it refuses the token."""
        try:
            status, _, content = self._send("GET", path, b"", time.monotonic() + HEALTH_SECONDS)
        except httpx.TransportError as error:
            self._fails()
            raise Unanswered(f"{self.name}: {_words(error)}") from None
        if status == 401:
            raise ConfigError(f"{self.name} refuses the token; expected its secret in {TOKEN} of the environment")
        if status != 200:
            self._fails()
            raise Unanswered(f"{self.name}: HTTP {status} at {path}")
        return content

    def _fails(self) -> float:
        """Since when it does."""
        now = time.monotonic()
        if now > self._avoid:
            self._trouble = now
        self._avoid = now + AVOID_SECONDS
        return self._trouble

    @property
    def _known_to_repeat(self) -> bool:
        return self._health is not None and self._health.call_ids

    def _send(self, method: str, path: str, body: bytes, until: float) -> tuple[int, float, bytes]:
        """One try: status, the seconds after which to ask again, content."""
        left = max(until - time.monotonic(), 0.1)
        timeout = httpx.Timeout(left, connect=min(left, CONNECT_SECONDS))
        headers = {"Content-Type": "application/json"}
        content = bytearray()
        with self._client.stream(method, self._url + path, content=body, headers=headers, timeout=timeout) as response:
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise Refused(f"its answer is larger than {MAX_ANSWER:,} bytes", response.status_code)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the answer did not end in time")
            after = response.headers.get("retry-after", "")
            return response.status_code, min(float(after), LONGEST_PAUSE) if after.isdigit() else 0.0, bytes(content)


class Servers:
    """All of them. Threads may share it."""

    def __init__(self, addresses: Sequence[str], *, connections: int, patience: float):
        """Waits for the first to answer, for `patience` seconds; ConfigError, one line, where none does."""
        self._servers = [Server(address, connections) for address in addresses]
        self._lock = threading.Lock()
        try:
            self.schemas = self._greet(patience)
            """Of the first that tells; None: none does."""
        except BaseException:
            self.close()
            raise

    def take(self) -> Server:
        """The one with the fewest trajectories, of which it gets one more; those in trouble last."""
        with self._lock:
            server = min(self._servers, key=lambda one: (one.troubled, one.trajectories, random.random()))
            server.trajectories += 1
            return server

    def give_back(self, server: Server) -> None:
        """A trajectory has left it."""
        with self._lock:
            server.trajectories -= 1

    @property
    def any_untroubled(self) -> bool:
        return not all(server.troubled for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def _greet(self, patience: float) -> list[Schema] | None:
        until = time.monotonic() + patience
        with ThreadPoolExecutor(len(self._servers)) as pool:
            while all(problems := list(pool.map(_absence, self._servers))):
                if time.monotonic() >= until:
                    said = "; ".join(f"{s.name}: {p}" for s, p in zip(self._servers, problems, strict=True))
                    raise ConfigError(f"no tool server answers ({said}); expected `hdpo serve-tools` at tools.servers")
                time.sleep(min(0.5, patience / 4))
        present = [server for server, problem in zip(self._servers, problems, strict=True) if problem is None]
        for server, problem in zip(self._servers, problems, strict=True):
            if problem is not None:
                logger.warning("the tool server %s does not answer (%s); it is asked again later", server.name, problem)
        told = [_told(server) for server in present]
        return next((schemas for schemas in told if schemas is not None), None)


def _told(server: Server) -> list[Schema] | None:
    try:
        return server.schemas()
    except (Unanswered, ValidationError) as error:
        logger.warning("the tool server %s does not say what tools it has: %s", server.name, _words(error))
        return None


def _absence(server: Server) -> str | None:
    """Why it does not answer; None where it does."""
    try:
        server.health()
    except Unanswered as error:
        return str(error)
    return None


def _parsed(status: int, content: bytes) -> ObservationBatch:
    if status != 200:
        raise Refused(f"HTTP {status}: {_detail(content)}", status)
    try:
        return ObservationBatch.model_validate_json(content)
    except ValidationError as error:
        raise Refused(f"its answer is not of the format: {error.errors()[0]['msg'][:200]}", 200) from None


def _detail(content: bytes) -> str:
    """What an error's body says, in one line."""
    return " ".join(content[:300].decode("utf-8", "replace").split())


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
