"""A language model that says whether an answer is right, behind an OpenAI-compatible endpoint.

Every bound is one of wall time: a server that sends a byte now and then is as dead as one that sends none.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from openai import APIStatusError, AsyncOpenAI, OpenAIError

from hdpo_jax.config import JudgeConfig
from hdpo_jax.rewards.judge_cache import VerdictCache
from hdpo_jax.rewards.judge_prompt import FORMS, Form, code_of, content_key, imitates, messages, verdict_of
from hdpo_jax.rewards.verdict import Claim, VerifierOutage

Result = TypeVar("Result")

KEY_VARIABLE = "HDPO_JUDGE_API_KEY"
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, also where the server asks for more."""
LONGEST_ERROR = 200
"""Characters of what a server says that go into an error."""


@dataclass(kw_only=True)
class Tally:
    """What a judge did since it was last asked."""

    asked: int = 0
    """Claims that the endpoint was asked about."""
    cached: int = 0
    """Claims that the answer was known to, or was under way for."""
    seconds: float = 0.0
    """Of all claims asked about, retries included."""
    checked: int = 0
    """Claims asked about a second time, in other words."""
    disagreed: int = 0
    """Those where the second verdict was another."""


class _Failure(NamedTuple):
    """Why an attempt gave no reply."""

    said: str
    final: bool
    """Another attempt would fail alike."""
    wait: float
    """Seconds that the server asks for."""


class Judge:
    """A Verifier that never leaves a claim open: right, wrong, or VerifierOutage. Any thread may ask.

    At most `config.concurrency` requests are under way, of which no two about the same claim; verdicts are cached by
    content, failures never. To be closed: what is under way then is given up at once.
    """

    def __init__(self, config: JudgeConfig, *, pause_seconds: float = 1.0):
        """`pause_seconds`: the longest pause before the second attempt; it doubles with each further one."""
        self._config = config
        self._pause = pause_seconds
        self._cache = VerdictCache(config.cache)
        self._key = os.environ.get(KEY_VARIABLE, "")
        # The client's own retries are hidden, and its time limit is one of silence.
        self._client = AsyncOpenAI(
            base_url=config.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=config.timeout_seconds,
        )
        # Those of the environment are for OpenAI, and not for whoever serves the judge.
        self._client.organization = self._client.project = None
        self._places = asyncio.Semaphore(config.concurrency)
        self._under_way: dict[str, asyncio.Task[bool]] = {}
        self._tally = Tally()
        self._closed = False
        self._door = threading.Lock()
        # One thread has the loop, and with it the cache and the tally; the lock is for whoever comes as it closes.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def __call__(self, claim: Claim) -> bool:
        """Whether the claim is right. Raises VerifierOutage where the judge could not be asked, or did not say."""
        if not claim.prediction.strip() or imitates(claim.prediction, claim.truths):
            return False
        key = content_key(claim, model=self._config.model, max_chars=self._config.max_chars)
        return self._run(self._judged(claim, key))

    @property
    def checks(self) -> bool:
        """Whether some claims are asked about twice."""
        return self._config.double_check > 0

    def take_tally(self) -> Tally:
        """What was counted since the last call."""

        async def take() -> Tally:
            taken, self._tally = self._tally, Tally()
            return taken

        return self._run(take())

    def close(self) -> None:
        """Gives up what is under way: whoever waits for it gets VerifierOutage."""
        with self._door:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What comes of it in the loop; to be called from other threads."""
        with self._door:
            if self._closed:
                work.close()
                raise VerifierOutage("the judge is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    async def _give_up(self) -> None:
        # Those that came through the door in time have their tasks by now; what waits for the network is cancelled.
        callers = asyncio.all_tasks() - {asyncio.current_task()}
        while waiting := [task for task in callers if not task.done()]:
            for task in self._under_way.values():
                task.cancel()
            await asyncio.wait(waiting, timeout=0.01)
        await self._client.close()

    async def _judged(self, claim: Claim, key: str) -> bool:
        known = self._cache.get(key)
        if known is not None:
            self._tally.cached += 1
            return known
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._verdict(claim, key))
            task.add_done_callback(lambda _: self._under_way.pop(key))
        else:
            self._tally.cached += 1
        try:
            return await task
        except asyncio.CancelledError:
            raise VerifierOutage("the judge was closed before it could say") from None

    async def _verdict(self, claim: Claim, key: str) -> bool:
        """What the judge says, remembered."""
        self._tally.asked += 1
        started = time.perf_counter()
        try:
            verdict = await self._ask(claim, key, FORMS)
            if _share_of(key) < self._config.double_check:
                self._tally.checked += 1
                if await self._ask(claim, key, FORMS[1:]) != verdict:
                    # A majority decides: to drop the answer would drop its group, and to keep the first
                    # verdict would make the check one for show.
                    self._tally.disagreed += 1
                    verdict = await self._ask(claim, key, FORMS[2:])
        finally:
            self._tally.seconds += time.perf_counter() - started
        self._cache.put(key, verdict)
        return verdict

    async def _ask(self, claim: Claim, key: str, forms: Sequence[Form]) -> bool:
        """By the first form; where what comes back is no verdict, once more: at temperature 0, best by another."""
        replies = []
        for form in (forms[0], forms[-1]):
            asked = messages(claim, form, code=code_of(key), max_chars=self._config.max_chars)
            replies.append(await self._reply(asked))
            verdict = verdict_of(replies[-1])
            if verdict is not None:
                return verdict
        said = self._safe(replies[-1])
        raise VerifierOutage(f"{self._name} says {said!r}; expected CORRECT or INCORRECT")

    async def _reply(self, asked: Any) -> str:
        """What the model writes. Raises VerifierOutage once the attempts are used up, or would be in vain."""
        failure = None
        for attempt in range(self._config.attempts):
            if failure is not None:
                longest = self._pause * 2 ** (attempt - 1)
                await asyncio.sleep(min(LONGEST_PAUSE, max(failure.wait, random.uniform(0, longest))))
            found = await self._attempt(asked)
            if isinstance(found, str):
                return found
            failure = found
            if failure.final:
                break
        assert failure is not None
        raise VerifierOutage(f"{self._name} can not be asked: {failure.said}")

    async def _attempt(self, asked: Any) -> str | _Failure:
        seconds = self._config.timeout_seconds
        async with self._places:
            try:
                async with asyncio.timeout(seconds):
                    completion = await self._client.chat.completions.create(
                        model=self._config.model, messages=asked, temperature=0, max_tokens=self._config.max_tokens
                    )
                # A server that answers with something else is found out here, not by the client.
                return str(completion.choices[0].message.content or "")
            except TimeoutError:
                return _Failure(f"no answer within {seconds:g} s", final=False, wait=0.0)
            except APIStatusError as error:
                status = error.status_code
                passing = status in (408, 409, 425, 429) or status >= 500
                wait = _seconds(error.response.headers.get("retry-after"))
                return _Failure(self._safe(error.message), final=not passing, wait=wait)
            except (OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
                cause = error.__cause__ or error
                return _Failure(self._safe(f"{type(cause).__name__}: {cause}"), final=False, wait=0.0)

    @property
    def _name(self) -> str:
        host = self._client.base_url.host
        place = f"{host}:{self._client.base_url.port or ''}".rstrip(":")
        return f"the judge ({self._config.model} at {place})"

    def _safe(self, said: str) -> str:
        """On one line, and without the key, which servers like to repeat."""
        if self._key:
            said = said.replace(self._key, "[key]")
        said = " ".join(said.split())
        return said if len(said) <= LONGEST_ERROR else f"{said[:LONGEST_ERROR]} […]"


def _share_of(key: str) -> float:
    """A number from 0 to 1 that is the key's for good."""
    return int(key[:8], 16) / 2**32


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
