"""Answers from the web, kept on disk by what was asked."""

import logging
from pathlib import Path

from hdpo_jax.files import replacing

logger = logging.getLogger(__name__)


class WebCache:
    """A folder of answers. Only what was understood is put here: failures never are."""

    def __init__(self, folder: str):
        """`folder`: "" for a cache that keeps nothing."""
        self._folder = Path(folder) if folder else None

    def get(self, digest: str) -> bytes | None:
        """The answer to the question of that digest; None where there is none, or none that can be read."""
        if self._folder is None:
            return None
        try:
            # An empty file is what a power cut may leave.
            return self._place(self._folder, digest).read_bytes() or None
        except OSError:
            return None

    def put(self, digest: str, answer: bytes) -> None:
        """Keeps an answer, whole or not at all; with a full disk the next who asks has to ask the web again."""
        if self._folder is None:
            return
        try:
            with replacing(self._place(self._folder, digest)) as temporary:
                temporary.write_bytes(answer)
        except OSError as error:
            logger.warning("an answer can not be kept in tools.web.cache: %s", error)

    @staticmethod
    def _place(folder: Path, digest: str) -> Path:
        # Two levels: folders of a million files are slow to list.
        return folder / digest[:2] / digest[2:]
