"""Verdicts by content, in memory and, where asked for, in a folder that runs and processes share."""

import json
import logging
from pathlib import Path

from hdpo_jax.config import ConfigError
from hdpo_jax.files import write_text_atomically

log = logging.getLogger(__name__)

IN_MEMORY = 200_000
"""Verdicts; the oldest give way."""


class VerdictCache:
    """`folder`: where verdicts outlive the process, a file each; empty: nowhere. To be used by one thread."""

    def __init__(self, folder: str):
        self._folder = Path(folder) if folder else None
        self._verdicts: dict[str, bool] = {}
        if self._folder is not None:
            try:
                write_text_atomically(self._folder / "about.json", json.dumps({"holds": "verdicts of a judge"}))
            except OSError as error:
                raise ConfigError(f"rewards.judge.cache is {folder!r}, where nothing can be written: {error}") from None

    def get(self, key: str) -> bool | None:
        """None: not known."""
        if key not in self._verdicts and (found := self._read(key)) is not None:
            self._remember(key, found)
        return self._verdicts.get(key)

    def put(self, key: str, verdict: bool) -> None:
        self._remember(key, verdict)
        if self._folder is None:
            return
        try:
            write_text_atomically(self._path(self._folder, key), json.dumps({"correct": verdict}))
        except OSError as error:
            # It costs questions, no verdict is wrong for it. Said once: nothing is kept in that folder any more.
            log.warning("verdicts are no longer kept in %s: %s", self._folder, error)
            self._folder = None

    def _remember(self, key: str, verdict: bool) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > IN_MEMORY:
            del self._verdicts[next(iter(self._verdicts))]

    def _read(self, key: str) -> bool | None:
        if self._folder is None:
            return None
        try:
            found = json.loads(self._path(self._folder, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        correct = found.get("correct") if isinstance(found, dict) else None
        return correct if isinstance(correct, bool) else None

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"
