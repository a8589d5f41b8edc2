"""Where images and videos come from: bytes, paths and base64 data URIs. Nothing here decodes what the files hold."""

import base64
import io
import urllib.request
from pathlib import Path
from typing import BinaryIO

Source = bytes | str | Path
"""A file's bytes, a path (plain or file://), or a base64 data URI."""


def named(source: Source, what: str) -> str:
    """How errors name a source; `what` is image or video. Of a long URI they show the beginning, of a path the end."""
    if isinstance(source, bytes):
        return f"{what} of {len(source)} bytes"
    text = str(source)
    return f"{what} {text[:80]!r}" if text.startswith("data:") else f"{what} {text[-80:]!r}"


def read_file(source: Source, what: str) -> bytes:
    """The file that a source means, not decoded; bytes stay as they are.

    Raises ValueError, one line, for what can not be read.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.startswith("data:"):
        return _payload(source, what)
    with open_file(source, what) as file:
        return file.read()


def open_file(source: Source, what: str) -> BinaryIO:
    """The same, open to be read; a file on disk is not held in memory. Raises ValueError, one line."""
    if isinstance(source, bytes) or (isinstance(source, str) and source.startswith("data:")):
        return io.BytesIO(read_file(source, what))
    name = named(source, what)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{name} is a web address; expected a path or a data URI")
    if isinstance(source, str) and source.startswith("file://"):
        source = urllib.request.url2pathname(source.removeprefix("file://"))
    try:
        return Path(source).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name} can not be read: {reason}; expected a file or a data URI") from error


def _payload(uri: str, what: str) -> bytes:
    expected = f"expected data:{what}/{'png' if what == 'image' else 'mp4'};base64,…"
    _, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"{named(uri, what)} holds no data; {expected}")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise ValueError(f"{named(uri, what)} is not base64; {expected}") from error
