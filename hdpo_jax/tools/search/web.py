"""Questions to a provider on the web: in time, paced, tried again, kept, and without showing the key."""

import asyncio
import concurrent.futures
import email.utils
import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import httpx

from hdpo_jax.config import WebConfig
from hdpo_jax.tools.search.keys import HIDDEN, ApiKey, Redaction
from hdpo_jax.tools.search.results import SearchError, printable
from hdpo_jax.tools.search.web_cache import WebCache

MAX_BYTES = 8 * 2**20
"""Of an answer, unpacked; the reading ends there."""
FORMAT = 1
"""Of what is kept of answers; another number makes what is on disk unknown."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that another attempt may not meet."""
REFUSED = {401, 403}
"""Statuses of a wrong key."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request without its key: what makes two of them the same."""

    method: Literal["GET", "POST"] = "GET"
    url: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back with status 200."""

    headers: Mapping[str, str]
    content: bytes


class UnusableAnswer(Exception):
    """Not what the provider promises: an error page, half an answer. Worth another attempt."""


class HopelessAnswer(Exception):
    """A refusal that another attempt would meet again."""


Read = Callable[[Answer], bytes]
"""What of an answer is kept. Raises UnusableAnswer or HopelessAnswer."""


class WebClient:
    """One provider. Threads may share it: they wait, while one thread with an event loop sends and receives.

    An event loop, because only there a time limit is one: a server that sends a byte a second never exceeds the
    time limits of a socket.
    """

    def __init__(
        self,
        config: WebConfig,
        name: str,
        *,
        key: ApiKey | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ):
        """`headers` and `params` go with every request; the key may stand there, and nowhere else."""
        self._config = config
        self._name = name
        self._key = key
        self._headers, self._params = dict(headers or {}), dict(params or {})
        self._cache = WebCache(config.cache)
        self._pace = Pace(config.requests_per_second)
        self._random = random.Random()
        self._asked: dict[str, asyncio.Task[bytes]] = {}
        # Redirects are not followed: the key would go along to wherever they lead.
        self._client = httpx.AsyncClient(timeout=config.timeout_seconds, follow_redirects=False)
        self._redaction = Redaction(key) if key else None
        if self._redaction:
            logging.getLogger("httpx").addFilter(self._redaction)
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name} requests", daemon=True)
        self._thread.start()

    def ask(self, question: Question, read: Read) -> bytes:
        """What `read` keeps of the answer. Raises SearchError, one line without the key."""
        return self._result(self._submit(question, read))

    def ask_all(self, questions: Sequence[Question], read: Read) -> list[bytes | None]:
        """The same for several at a time; None for those that failed."""
        answers: list[bytes | None] = []
        for future in [self._submit(question, read) for question in questions]:
            try:
                answers.append(self._result(future))
            except SearchError:
                answers.append(None)
        return answers

    def close(self) -> None:
        """Gives up what is under way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._redaction:
            logging.getLogger("httpx").removeFilter(self._redaction)

    def _submit(self, question: Question, read: Read) -> "concurrent.futures.Future[bytes]":
        with self._lock:
            if self._closed:
                raise SearchError(f"{self._name} is closed")
            return asyncio.run_coroutine_threadsafe(self._once(question, read), self._loop)

    def _result(self, future: "concurrent.futures.Future[bytes]") -> bytes:
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise SearchError(f"{self._name} was closed meanwhile") from None

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _once(self, question: Question, read: Read) -> bytes:
        """From the cache, or from the one request for all who ask the same meanwhile: rollouts of a group often do."""
        digest = question.digest
        kept = self._cache.get(digest)
        if kept is not None:
            return kept
        task = self._asked.get(digest)
        if task is None:
            task = self._asked[digest] = asyncio.create_task(self._attempts(question, read))
            task.add_done_callback(lambda _: self._asked.pop(digest))
            answer = await task
            self._cache.put(digest, answer)
            return answer
        return await asyncio.shield(task)

    async def _attempts(self, question: Question, read: Read) -> bytes:
        reason = ""
        for attempt in range(self._config.attempts):
            if attempt:
                longest = min(self._config.longest_pause_seconds, self._config.pause_seconds * 2 ** (attempt - 1))
                await asyncio.sleep(self._random.uniform(0, longest))
            await self._pace.turn()
            try:
                async with asyncio.timeout(self._config.timeout_seconds):
                    return read(await self._send(question))
            except UnusableAnswer as error:
                reason = str(error)
            except HopelessAnswer as error:
                raise self._failure(str(error)) from None
            except (TimeoutError, httpx.TimeoutException):
                reason = f"no answer within {self._config.timeout_seconds:g} s"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {printable(str(error), 200)}".strip()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._failure(f"{type(error).__name__} {printable(str(error), 200)}") from None
        tries = "once" if self._config.attempts == 1 else f"{self._config.attempts} times, and in the end"
        raise self._failure(f"failed {tries}: {reason}")

    async def _send(self, question: Question) -> Answer:
        """One attempt. Raises UnusableAnswer where another may succeed, HopelessAnswer where none will."""
        request = self._client.build_request(
            question.method,
            question.url,
            params={**question.params, **self._params},
            json=question.body,
            headers=self._headers,
        )
        response = await self._client.send(request, stream=True)
        try:
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_BYTES:
                    raise HopelessAnswer(f"sent more than {MAX_BYTES:,} bytes")
        finally:
            await response.aclose()
        # A provider may repeat the key; what it says ends up in observations, on disk and in the log.
        content = content.replace(self._key.value.encode(), HIDDEN.encode()) if self._key else content
        status = response.status_code
        if status == 200:
            return Answer(headers=response.headers, content=bytes(content))
        said = printable(bytes(content[:2_000]).decode("utf-8", "replace"), 200)
        answered = f"answered {status}" + (f" ({said})" if said else "")
        if status in REFUSED and self._key:
            raise HopelessAnswer(f"refused the key in {self._key.variable}: it {answered}")
        if status in PASSING:
            self._pace.hold(min(_retry_after(response.headers), self._config.longest_pause_seconds))
            raise UnusableAnswer(answered)
        if response.has_redirect_location:
            raise HopelessAnswer(f"answered {status}, a redirect, which is not followed; is tools.web.url right?")
        raise HopelessAnswer(answered)

    def _failure(self, what: str) -> SearchError:
        return SearchError(self._redacted(f"{self._name} {what}"))

    def _redacted(self, text: str) -> str:
        return self._key.redacted(text) if self._key else text


class Pace:
    """When a request may be sent: so many a second, whoever asks, and none while the provider wants a pause."""

    def __init__(self, per_second: float):
        """0: no bound."""
        self._gap = 1 / per_second if per_second else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Waits for the next moment that is nobody's yet."""
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + self._gap
        await asyncio.sleep(at - now)

    def hold(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the provider asks for, as a number or as a date; 0 where it does not."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
