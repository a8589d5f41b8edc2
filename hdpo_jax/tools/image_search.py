"""The `image_search` tool: up to ten titles with thumbnails of pages that show the prompt's image."""

import logging
from collections.abc import Mapping
from typing import Any

from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools.protocol import IMAGE_SEARCH_SCHEMA, Subject
from hdpo_jax.tools.search.results import ImageSearch, SearchError, numbered
from hdpo_jax.tools.search.thumbnails import picture, shrunk
from hdpo_jax.types import Observation

NOTHING = "No results: nothing is known that looks like the image."
FAILED = "The image search failed. This does not mean that there are no results."

logger = logging.getLogger(__name__)


class ImageSearchTool:
    """Looks prompts' images up in the same place for every trajectory."""

    name = "image_search"
    schema = IMAGE_SEARCH_SCHEMA

    def __init__(self, config: ToolsConfig):
        """Raises ConfigError, one line, where the index, the cache or the provider's key is missing."""
        self._config = config
        self._search = _open(config)

    def open(self, subject: Subject) -> "ImageSearchSession":
        return ImageSearchSession(self._search, subject, self._config)

    def close(self) -> None:
        self._search.close()


class ImageSearchSession:
    """One trajectory's view: always the same image."""

    def __init__(self, search: ImageSearch, subject: Subject, config: ToolsConfig):
        self._search = search
        self._subject = subject
        self._config = config

    def call(self, arguments: Mapping[str, Any]) -> Observation:
        """Looks the prompt's first image up. A prompt without one can still be in a cache, by its names."""
        settings = self._config.image_search
        try:
            matches = self._search.search(self._subject, settings.results)
        except SearchError as error:
            logger.warning("image_search: %s", error)
            return Observation(text=FAILED, ok=False)
        if not matches:
            return Observation(text=NOTHING)
        images: list[Image.Image] = []
        entries = []
        for match in matches:
            small = _thumbnail(match.thumbnail, settings.thumbnail)
            shown = small is not None and len(images) < self._config.max_images
            if small is not None and shown:
                images.append(small)
            entries.append((match.title + f" [image {len(images)}]" * shown, match.link))
        count = len(self._subject.images)
        note = f"The first of the prompt's {count} images was looked up.\n\n" if count > 1 else ""
        return Observation(text=note + numbered(entries), images=tuple(images))

    def close(self) -> None: ...


def _thumbnail(data: bytes | None, side: int) -> Image.Image | None:
    """None for what is no image: the web's word for it is not worth much."""
    if data is None:
        return None
    try:
        return shrunk(picture(data), side)
    except ValueError as error:
        logger.info("a thumbnail is left out: %s", error)
        return None


def _open(config: ToolsConfig) -> ImageSearch:
    if config.image_search.provider == "index":
        from hdpo_jax.tools.search.image_index import ImageIndex

        return ImageIndex(config.image_search.path)
    if config.image_search.provider == "cache":
        from hdpo_jax.tools.search.image_cache import open_cache

        return open_cache(config.image_search.path)
    from hdpo_jax.tools.search.lens import LensSearch

    return LensSearch(config)
