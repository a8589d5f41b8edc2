"""A provider's server for each test, and keys to find where they must not be."""

from collections.abc import Iterator

import pytest

from tests.tools.search.provider_server import ProviderServer, provider_server

KEY = "k3y/with+marks=0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProviderServer]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SERPER_API_KEY", "SERPAPI_API_KEY", "BRIGHTDATA_API_KEY"):
        monkeypatch.setenv(name, KEY)
    with provider_server() as server:
        yield server
