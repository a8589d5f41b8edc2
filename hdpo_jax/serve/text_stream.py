"""Sampled tokens as text, as they come: whole characters, and nothing that might become a stop sequence."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""
LONGEST_CHARACTER = 4
"""Tokens that one character may be spread over, at most: one for each of its bytes."""


class TextStream:
    """The text of one turn. `add` gives what has become certain, `end` what is left."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        """`decode`: ids to text; of a byte-level tokenizer, so that parts can be decoded apart."""
        self._decode = decode
        self._stops = tuple(stops)
        self._pending: list[int] = []
        """Ids that end in the midst of a character."""
        self._held = ""
        """Text that may be the beginning of a stop sequence."""
        self.stopped = False
        """A stop sequence was written: what follows does not count."""

    def add(self, ids: Sequence[int]) -> str:
        if self.stopped:
            return ""
        self._pending += ids
        for missing in range(LONGEST_CHARACTER):
            known = self._pending[: len(self._pending) - missing]
            text = self._decode(known)
            if not text.endswith(REPLACEMENT):
                self._pending = self._pending[len(known) :]
                return self._certain(text)
        # No character takes longer: these bytes are none.
        text, self._pending = self._decode(self._pending), []
        return self._certain(text)

    def end(self) -> str:
        text, self._pending = self._decode(self._pending), []
        rest = "" if self.stopped else self._certain(text) + self._held
        self._held = ""
        return rest

    def _certain(self, text: str) -> str:
        """What of the held text and `text` no stop sequence can touch any more."""
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
