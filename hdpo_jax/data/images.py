"""Image files in data: their bytes out of a column, and whether they can be decoded."""

import base64
import binascii
import io
import re
from typing import Any

from PIL import Image

from models.qwen3_vl.pixels import FORMATS, MAX_PIXELS, WIDEST

MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*", b"MM\0*")
"""How files of these formats begin."""

_DATA_URI = re.compile(r"data:[\w/+.-]*;base64,")


class ImageError(ValueError):
    """What is wrong with an image file, in words that go behind "image 2"."""


def file_in_cell(value: Any) -> bytes:
    """The image file in a cell: `{"bytes": …}`, bytes, a list of byte values, base64 or a data URI."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, list):
        try:
            value = bytes(value)
        except (TypeError, ValueError):
            raise ImageError("is a list, but not of byte values") from None
    if isinstance(value, str):
        prefix = _DATA_URI.match(value)
        try:
            value = base64.b64decode(value[prefix.end() if prefix else 0 :], validate=True)
        except (binascii.Error, ValueError):
            raise ImageError("is text, but not base64") from None
    if not isinstance(value, bytes):
        raise ImageError(f"is {type(value).__name__}, not the bytes of a file")
    if not value:
        raise ImageError("is empty")
    return value


def check_file(data: bytes) -> None:
    """Raises ImageError for a file that is no image, has an impossible size, or stops short of its end.

    Reads headers and marks, and decodes only where a format has none: a damaged pixel in the middle passes.
    """
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"is {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if max(width, height) > WIDEST * min(width, height):
        raise ImageError(f"is {width} x {height} pixels; no side may be more than {WIDEST} times the other")
    if image.format == "PNG":
        try:
            # Every chunk up to the end mark, by its checksum.
            image.verify()
        except Exception as error:
            raise ImageError(f"is damaged: {error}") from error
    elif not _reaches_its_end(data, image.format):
        check_pixels(data)


def check_pixels(data: bytes) -> None:
    """Raises ImageError for a file whose pixels can not all be decoded."""
    image = _open(data)
    try:
        # A JPEG is read to its end and unpacked at an eighth of its size: a third of the work.
        image.draft(None, (1, 1))
        image.load()
    except Exception as error:
        raise ImageError(f"can not be decoded: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"is too large: {error}") from error
    except Exception as error:
        # Pillow's readers raise whatever a damaged header leads them into.
        if data.startswith(MAGIC):
            raise ImageError(f"is cut short or damaged ({len(data):,} bytes)") from error
        raise ImageError(f"is no image that can be read (it starts with {data[:8]!r})") from error


def _reaches_its_end(data: bytes, kind: str | None) -> bool:
    if kind in ("JPEG", "MPO"):
        # Inside a scan no marker can stand, so an end mark behind the last scan is the end of the image.
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") >= 0
    if kind == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return False
