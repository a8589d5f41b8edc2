"""Providers of text search: how each wants to be asked, and what it answers.

Serper       POST /search {"q", "num"}; key in a header; "organic"                       (serper.dev)
SerpApi      GET /search.json?engine=google; key in the address; "organic_results"       (serpapi.com/search-api)
Bright Data  POST /request {"zone", "url", "format"}; bearer key; "organic"              (docs.brightdata.com, SERP API)
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlencode

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.search.keys import ApiKey
from hdpo_jax.tools.search.results import LINK_CHARS, SNIPPET_CHARS, TITLE_CHARS, Result, printable
from hdpo_jax.tools.search.web import Answer, HopelessAnswer, Question, UnusableAnswer, WebClient

QUERY_CHARS = 500
"""Of a query; search engines read no more."""
ZONE, DEFAULT_ZONE = "BRIGHTDATA_SERP_ZONE", "serp_api1"
"""Bright Data's name for what is paid for; it is no secret, but stands beside the key."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A provider's ways."""

    name: str
    address: str
    variable: str
    """Of the environment: the key."""
    headers: Callable[[str], Mapping[str, str]] = lambda key: {}
    params: Callable[[str], Mapping[str, str]] = lambda key: {}
    question: Callable[[str, str, int], Question]
    """From the address, a query and a number of results."""
    results: Callable[[Answer], Iterable[Result]]
    """Raises UnusableAnswer or HopelessAnswer."""

    def client(self, config: ToolsConfig) -> WebClient:
        """Raises ConfigError where the environment has no key."""
        key = ApiKey.from_environment(self.variable)
        headers, params = self.headers(key.value), self.params(key.value)
        return WebClient(config.web, self.name, key=key, headers=headers, params=params)

    def base(self, config: ToolsConfig) -> str:
        return (config.web.url or self.address).rstrip("/")


class WebTextSearch:
    """A provider of text search."""

    def __init__(self, config: ToolsConfig):
        provider = PROVIDERS.get(config.text_search.provider)
        if provider is None:
            raise ConfigError(f"tools.text_search.provider is {config.text_search.provider!r}; it is not on the web")
        self._provider = provider
        self._base = provider.base(config)
        self._client = provider.client(config)

    def search(self, query: str, count: int) -> list[Result]:
        query = printable(query, QUERY_CHARS)
        if not query:
            return []
        kept = self._client.ask(self._provider.question(self._base, query, count), self._read)
        return [Result(**fields) for fields in json.loads(kept)][:count]

    def close(self) -> None:
        self._client.close()

    def _read(self, answer: Answer) -> bytes:
        """The results alone, as JSON: a hundredth of some answers."""
        return json.dumps([asdict(result) for result in self._provider.results(answer)]).encode()


def json_object(answer: Answer) -> dict[str, Any]:
    """The answer's JSON. Raises UnusableAnswer for anything else: an HTML page, half an object."""
    try:
        payload = json.loads(answer.content)
    except (ValueError, RecursionError):
        kind = printable(answer.headers.get("content-type", ""), 50) or "unknown type"
        raise UnusableAnswer(f"sent no JSON, but {len(answer.content):,} bytes of {kind}") from None
    if not isinstance(payload, dict):
        raise UnusableAnswer("sent JSON that is no object")
    return payload


def items(payload: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects of a list; none where it is missing."""
    found = payload.get(name) or []
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _results(entries: Iterable[Mapping[str, Any]], snippet: str) -> list[Result]:
    """Those entries that have a title or a snippet; `snippet` is the provider's name for the latter."""
    results = [
        Result(
            title=printable(entry.get("title"), TITLE_CHARS),
            link=printable(entry.get("link"), LINK_CHARS),
            snippet=printable(entry.get(snippet), SNIPPET_CHARS),
        )
        for entry in entries
    ]
    return [result for result in results if result.title or result.snippet]


def _ask_serper(base: str, query: str, count: int) -> Question:
    return Question(method="POST", url=f"{base}/search", body={"q": query, "num": count})


def serper_items(answer: Answer) -> list[dict[str, Any]]:
    """What Serper found, by words or by image."""
    payload = json_object(answer)
    if not {"organic", "searchParameters"} & payload.keys():
        raise UnusableAnswer(f"sent no results: {printable(payload.get('message'), 200) or 'unknown JSON'}")
    return items(payload, "organic")


def _ask_serpapi(base: str, query: str, count: int) -> Question:
    return Question(url=f"{base}/search.json", params={"engine": "google", "q": query, "num": str(count)})


def _read_serpapi(answer: Answer) -> list[Result]:
    payload = json_object(answer)
    error = printable(payload.get("error"), 200)
    # An empty result is told as an error, with a state that tells it from others.
    empty = "hasn't returned any results" in error
    if error and not empty:
        raise UnusableAnswer(f"sent an error: {error}")
    if not empty and not {"organic_results", "search_metadata"} & payload.keys():
        raise UnusableAnswer("sent no results: unknown JSON")
    return _results(items(payload, "organic_results"), "snippet")


def _ask_brightdata(base: str, query: str, count: int) -> Question:
    page = "https://www.google.com/search?" + urlencode({"q": query, "num": count, "brd_json": 1})
    zone = os.environ.get(ZONE) or DEFAULT_ZONE
    return Question(method="POST", url=f"{base}/request", body={"zone": zone, "url": page, "format": "raw"})


def _read_brightdata(answer: Answer) -> list[Result]:
    # The status is 200 also where the search failed; these headers tell.
    error = printable(answer.headers.get("x-brd-error") or answer.headers.get("x-brd-err-msg"), 200)
    status = answer.headers.get("x-brd-status-code", "200")
    if error or not status.startswith("2"):
        problem = f"failed with {printable(status, 10)} ({error or 'no reason given'})"
        if status.startswith("4") and status != "429":
            raise HopelessAnswer(f"{problem}; is {ZONE} right?")
        raise UnusableAnswer(problem)
    payload = json_object(answer)
    if not {"organic", "general"} & payload.keys():
        raise UnusableAnswer("sent no results: unknown JSON")
    return _results(items(payload, "organic"), "description")


SERPER = Provider(
    name="Serper",
    address="https://google.serper.dev",
    variable="SERPER_API_KEY",
    headers=lambda key: {"X-API-KEY": key},
    question=_ask_serper,
    results=lambda answer: _results(serper_items(answer), "snippet"),
)
PROVIDERS = {
    "serper": SERPER,
    "serpapi": Provider(
        name="SerpApi",
        address="https://serpapi.com",
        variable="SERPAPI_API_KEY",
        params=lambda key: {"api_key": key},
        question=_ask_serpapi,
        results=_read_serpapi,
    ),
    "brightdata": Provider(
        name="Bright Data",
        address="https://api.brightdata.com",
        variable="BRIGHTDATA_API_KEY",
        headers=lambda key: {"Authorization": f"Bearer {key}"},
        question=_ask_brightdata,
        results=_read_brightdata,
    ),
}
