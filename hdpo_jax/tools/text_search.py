"""The `text_search` tool: up to ten titles, links and snippets, from an index on this machine or from the web."""

import logging
from collections.abc import Mapping
from typing import Any

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools.protocol import TEXT_SEARCH_SCHEMA, Subject
from hdpo_jax.tools.search.results import SearchError, TextSearch, numbered
from hdpo_jax.types import Observation

NOTHING = "No results."
FAILED = "The search failed. This does not mean that there are no results."

logger = logging.getLogger(__name__)


class TextSearchTool:
    """Searches the same place for every trajectory."""

    name = "text_search"
    schema = TEXT_SEARCH_SCHEMA

    def __init__(self, config: ToolsConfig):
        """Raises ConfigError, one line, where the index or the provider's key is missing."""
        self._count = config.text_search.results
        self._search = _open(config)

    def open(self, subject: Subject) -> "TextSearchSession":
        return TextSearchSession(self._search, self._count)

    def close(self) -> None:
        self._search.close()


class TextSearchSession:
    """One trajectory's searches; it keeps nothing from one to the next."""

    def __init__(self, search: TextSearch, count: int):
        self._search = search
        self._count = count

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        query = arguments.get("query")
        if not isinstance(query, str) or not query.strip():
            return Observation(text="text_search: argument `query` is empty; expected what to search for.", ok=False)
        try:
            results = self._search.search(query, self._count)
        except SearchError as error:
            logger.warning("text_search: %s", error)
            return Observation(text=FAILED, ok=False)
        return Observation(text=numbered((r.title, r.link, r.snippet) for r in results) or NOTHING)

    def close(self) -> None: ...


def _open(config: ToolsConfig) -> TextSearch:
    if config.text_search.provider == "index":
        from hdpo_jax.tools.search.text_index import TextIndex

        return TextIndex(config.text_search.index)
    from hdpo_jax.tools.search.providers import WebTextSearch

    return WebTextSearch(config)
