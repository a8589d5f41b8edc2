"""What goes wrong on the web, on a server that does it: within time, tried again where that helps, the key unseen."""

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from hdpo_jax.config import ConfigError, WebConfig
from hdpo_jax.tools.search.keys import ApiKey
from hdpo_jax.tools.search.providers import json_object
from hdpo_jax.tools.search.results import SearchError
from hdpo_jax.tools.search.web import MAX_BYTES, Answer, Question, WebClient
from tests.tools.search.conftest import KEY
from tests.tools.search.provider_server import (
    ProviderServer,
    Reply,
    drips,
    provider_server,
    resets,
    sends,
    stops_early,
)

QUICK = WebConfig(timeout_seconds=20, attempts=3, pause_seconds=0.01, longest_pause_seconds=1.5, requests_per_second=0)
IMPATIENT = replace(QUICK, timeout_seconds=0.5)
FINE = sends({"fine": True})

Client = Callable[[WebConfig], WebClient]


@pytest.fixture
def client() -> Iterator[Client]:
    opened: list[WebClient] = []

    def open_client(config: WebConfig) -> WebClient:
        key = ApiKey.from_environment("SERPER_API_KEY")
        opened.append(WebClient(config, "Serper", key=key, headers={"X-API-KEY": key.value}, params={"k": key.value}))
        return opened[-1]

    yield open_client
    for one in opened:
        one.close()


def read(answer: Answer) -> bytes:
    return json.dumps(json_object(answer)).encode()


def ask(client: WebClient, server: ProviderServer, query: str = "q") -> bytes:
    return client.ask(Question(url=f"{server.url}/search", params={"q": query}), read)


@pytest.mark.parametrize(
    "fault",
    [
        sends({}, 500),
        sends({"error": "slow down"}, 429),
        resets,
        drips,
        stops_early,
        sends(b'{"organic": [{"title": "Pa'),
        sends(b"<html>Just a moment</html>", Content_Type="text/html"),
        sends([1, 2]),
    ],
    ids=["500", "429", "reset", "drip", "stops early", "half JSON", "HTML", "a list"],
)
def test_what_may_pass_is_tried_again(server: ProviderServer, client: Client, fault: Reply):
    server.replies = [fault, FINE]
    config = replace(QUICK, timeout_seconds=2) if fault is drips else QUICK
    assert json.loads(ask(client(config), server)) == {"fine": True}
    assert len(server.received) == 2


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (sends({"message": "Unauthorized."}, 403), "refused the key in SERPER_API_KEY: it answered 403"),
        (sends({}, 401), "refused the key in SERPER_API_KEY"),
        (sends({"message": "Not enough credits"}, 400), "Not enough credits"),
        (sends({"echo": KEY}, 400), "[key]"),
        (sends(b"", 302, Location="http://127.0.0.1:1/"), "a redirect, which is not followed"),
        (sends(b" " * (MAX_BYTES + 1)), "more than 8,388,608 bytes"),
        (sends(gzip.compress(b" " * (4 * MAX_BYTES)), Content_Encoding="gzip"), "more than 8,388,608 bytes"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(server: ProviderServer, client: Client, reply: Reply, says: str):
    server.replies = [reply]
    with pytest.raises(SearchError) as failure:
        ask(client(QUICK), server)
    assert says in str(failure.value) and KEY not in str(failure.value) and "\n" not in str(failure.value)
    assert len(server.received) == 1


def test_a_key_goes_nowhere_but_to_its_provider(server: ProviderServer, client: Client):
    with provider_server([FINE]) as other:
        server.replies = [sends(b"", 307, Location=f"{other.url}/search")]
        with pytest.raises(SearchError):
            ask(client(QUICK), server)
        assert server.received[0].headers["x-api-key"] == KEY and not other.received


def test_attempts_end(server: ProviderServer, client: Client):
    server.replies = [sends({}, 503)]
    with pytest.raises(SearchError, match=r"^Serper failed 3 times, and in the end: answered 503 \({}\)$"):
        ask(client(QUICK), server)
    assert len(server.received) == 3


def test_a_time_limit_is_one_of_the_whole_attempt(server: ProviderServer, client: Client):
    server.replies = [drips]
    start = time.monotonic()
    with pytest.raises(SearchError, match="failed once: no answer within 0.5 s"):
        ask(client(replace(IMPATIENT, attempts=1)), server)
    # Ten seconds where each byte has half a second of its own.
    assert time.monotonic() - start < 6


def test_nobody_listens(client: Client, server: ProviderServer):
    with pytest.raises(SearchError, match="failed 3 times, and in the end: ConnectError"):
        client(QUICK).ask(Question(url="http://127.0.0.1:1/search"), read)


@pytest.mark.parametrize("later", [lambda: "1", lambda: formatdate(time.time() + 3, usegmt=True)])
def test_a_provider_that_wants_a_pause_gets_it_from_everybody(
    server: ProviderServer, client: Client, later: Callable[[], str]
):
    server.replies = [sends({}, 429, Retry_After=later()), FINE]
    one = client(QUICK)
    ask(one, server, "first")
    ask(one, server, "second")
    limited, again, other = (request.at for request in server.received)
    assert 0.9 < again - limited < 10 and other >= again


def test_a_pause_is_bounded(server: ProviderServer, client: Client):
    server.replies = [sends({}, 503, Retry_After="86400"), FINE]
    start = time.monotonic()
    ask(client(replace(QUICK, longest_pause_seconds=0.2)), server)
    assert time.monotonic() - start < 20


def test_threads_share_the_rate(server: ProviderServer, client: Client):
    server.replies = [FINE]
    one = client(replace(QUICK, requests_per_second=20))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: ask(one, server, str(number)), range(11)))
    times = sorted(request.at for request in server.received)
    # Without a rate they come within a few milliseconds.
    assert len(times) == 11 and times[-1] - times[0] >= 0.45


def test_who_asks_the_same_at_a_time_shares_an_answer(server: ProviderServer, client: Client):
    def slowly(handler):
        time.sleep(0.3)
        FINE(handler)

    server.replies = [slowly]
    one = client(QUICK)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: ask(one, server), range(16)))
    assert len(set(answers)) == 1 and len(server.received) == 1


def test_answers_are_kept_and_failures_are_not(server: ProviderServer, client: Client, tmp_path: Path):
    config = replace(QUICK, cache=str(tmp_path / "kept"), attempts=1)
    server.replies = [sends({}, 500), sends(b"<html>"), FINE]
    for _ in range(2):
        with pytest.raises(SearchError):
            ask(client(config), server)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for _ in range(3):
        # Also for another process: what was asked is the name, whatever the key.
        assert json.loads(ask(client(config), server)) == {"fine": True}
    assert len(server.received) == 3
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in kept.read_text() + str(kept)
    ask(client(config), server, "another")
    assert len(server.received) == 4
    kept.write_bytes(b"")
    assert ask(client(config), server) and len(server.received) == 5


def test_a_full_disk_does_not_cost_the_answer(server: ProviderServer, client: Client, tmp_path: Path):
    (tmp_path / "kept").write_text("a file where a folder should be")
    server.replies = [FINE]
    assert ask(client(replace(QUICK, cache=str(tmp_path / "kept"))), server)


def test_no_log_shows_the_key(server: ProviderServer, client: Client, caplog: pytest.LogCaptureFixture):
    server.replies = [sends({}, 500), FINE]
    with caplog.at_level(logging.DEBUG):
        ask(client(QUICK), server)
    # httpx logs addresses, and this one holds the key.
    assert "HTTP Request: GET" in caplog.text and "k=[key]" in caplog.text
    assert KEY not in caplog.text and "marks" not in caplog.text


def test_a_key_does_not_show_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    assert KEY not in repr(ApiKey.from_environment("SERPER_API_KEY"))


@pytest.mark.parametrize("value", ["", " ", "two words", "l\u00e4rm", "a\nb"])
def test_what_is_no_key_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv("SERPER_API_KEY", value)
    with pytest.raises(ConfigError, match="^SERPER_API_KEY ") as refusal:
        ApiKey.from_environment("SERPER_API_KEY")
    assert not value.strip() or value not in str(refusal.value)


def test_closing_ends_what_is_under_way(server: ProviderServer, client: Client):
    server.replies = [drips]
    one = client(replace(QUICK, timeout_seconds=60))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, one, server)
        while not server.received:
            time.sleep(0.01)
        one.close()
        with pytest.raises(SearchError, match="closed"):
            asked.result(timeout=5)
    with pytest.raises(SearchError, match="closed"):
        ask(one, server)
