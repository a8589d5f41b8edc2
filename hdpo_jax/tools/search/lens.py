"""Google Lens, asked through Serper: pages that show an image.

It takes the image's address on the web, not the image (POST /lens {"url"}; key in a header; "organic", with
"thumbnailUrl" on Google's servers).
"""

import hashlib
import json
from dataclasses import replace
from urllib.parse import quote, urlsplit

from hdpo_jax.config import ConfigError, ToolsConfig
from hdpo_jax.tools.protocol import Subject
from hdpo_jax.tools.search.providers import SERPER, serper_items
from hdpo_jax.tools.search.results import LINK_CHARS, TITLE_CHARS, ImageMatch, SearchError, printable
from hdpo_jax.tools.search.web import Answer, Question, WebClient
from models.qwen3_vl.sources import read_file

SETTING = "tools.image_search.image_url"
PLACES = ("{key}", "{sha256}")
THUMBNAIL_HOSTS = (".gstatic.com", ".googleusercontent.com")
"""Whose images are fetched, beside tools.web.url: an address in an answer may be any, also one of this network."""


class LensSearch:
    """Looks the prompt's first image up, by its address."""

    def __init__(self, config: ToolsConfig):
        """Raises ConfigError where the key is missing, or the pattern of addresses is none."""
        pattern = config.image_search.image_url
        if pattern and not any(place in pattern for place in PLACES):
            raise ConfigError(f"{SETTING} is {pattern!r}; expected an address with {' or '.join(PLACES)} in it")
        self._pattern = pattern
        self._base = SERPER.base(config)
        self._client = SERPER.client(config)
        # Without a key, and with one attempt: a thumbnail more or less is no reason to wait.
        self._thumbnails = WebClient(replace(config.web, attempts=1, requests_per_second=0), "a thumbnail's server")

    def search(self, subject: Subject, count: int) -> list[ImageMatch]:
        question = Question(method="POST", url=f"{self._base}/lens", body={"url": self._address(subject)})
        found = json.loads(self._client.ask(question, _read))[:count]
        fetched = [entry["thumbnail"] for entry in found if self._may_be_fetched(entry["thumbnail"])]
        answers = self._thumbnails.ask_all([Question(url=url) for url in fetched], lambda answer: answer.content)
        images = dict(zip(fetched, answers, strict=True))
        return [
            ImageMatch(title=entry["title"], link=entry["link"], thumbnail=_image(entry["thumbnail"], images))
            for entry in found
        ]

    def close(self) -> None:
        self._client.close()
        self._thumbnails.close()

    def _address(self, subject: Subject) -> str:
        """Where the prompt's image is on the web: a name of the prompt that is an address, or the pattern filled in."""
        given = next((key for key in subject.keys if key.startswith(("http://", "https://"))), None)
        if given is not None:
            return given
        if not self._pattern or ("{key}" in self._pattern and not subject.keys):
            raise SearchError(f"Google Lens takes an image's address: give prompts an image_url, or set {SETTING}")
        if "{sha256}" in self._pattern and not subject.images:
            raise SearchError("the prompt has no image")
        digest = hashlib.sha256(subject.images[0]).hexdigest() if subject.images else ""
        key = quote(subject.keys[0], safe="") if subject.keys else ""
        return self._pattern.replace("{key}", key).replace("{sha256}", digest)

    def _may_be_fetched(self, url: str) -> bool:
        try:
            parts, base = urlsplit(url), urlsplit(self._base)
        except ValueError:
            return False
        known = parts.scheme == "https" and (parts.hostname or "").endswith(THUMBNAIL_HOSTS)
        return known or (parts.scheme, parts.netloc) == (base.scheme, base.netloc)


def _read(answer: Answer) -> bytes:
    """Titles, pages and thumbnails' addresses, as JSON."""
    entries = [
        {
            "title": printable(item.get("title"), TITLE_CHARS),
            "link": printable(item.get("link"), LINK_CHARS),
            "thumbnail": item["thumbnailUrl"] if isinstance(item.get("thumbnailUrl"), str) else "",
        }
        for item in serper_items(answer)
    ]
    return json.dumps([entry for entry in entries if entry["title"]]).encode()


def _image(url: str, fetched: dict[str, bytes | None]) -> bytes | None:
    if url.startswith("data:"):
        try:
            return read_file(url, "image")
        except ValueError:
            return None
    return fetched.get(url)
