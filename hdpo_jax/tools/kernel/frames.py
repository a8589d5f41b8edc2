"""Frames on a session's private socket: a token, a JSON header, and the blobs that the header announces.

Every answer repeats the token of its request. Bytes that model-written code throws at the socket, and answers that
come too late, do not carry it and are refused.
"""

import json
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

TOKEN_BYTES = 16
PREFIX = struct.Struct(f">{TOKEN_BYTES}sI")
MAX_BLOBS = 4_096
MAX_NOTE = 4_096
"""Bytes of a header that comes without being asked for: it may say what went wrong."""

# Bound here: model-written code shares the interpreter and may rebind names in the modules these come from.
_dumps, _loads, _monotonic = json.dumps, json.loads, time.monotonic


class FrameError(Exception):
    """What came is not a frame; the socket can not be read any further."""


class Closed(Exception):
    """The other end is gone."""


class DeadlineError(Exception):
    """The frame was not complete in time."""


class Frame(NamedTuple):
    token: bytes
    header: dict[str, Any]
    blobs: list[bytearray]


def send(
    connection: socket.socket,
    token: bytes,
    header: dict[str, Any],
    blobs: Sequence[bytes | bytearray] = (),
    deadline: float | None = None,
) -> None:
    """Sends one frame; `deadline` is a time of `time.monotonic`, None waits for ever."""
    text = _dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    try:
        _arm(connection, deadline)
        connection.sendall(PREFIX.pack(token, len(text)) + text)
        for blob in blobs:
            _arm(connection, deadline)
            connection.sendall(blob)
    except TimeoutError:
        raise DeadlineError("sending") from None
    except OSError as error:
        raise Closed(str(error)) from None


def receive(
    connection: socket.socket,
    *,
    max_header: int,
    max_bytes: int,
    expected: bytes | None = None,
    deadline: float | None = None,
) -> Frame:
    """Reads one frame of at most `max_header` bytes of JSON and `max_bytes` of blobs, checked before they are read.

    `expected`: the token of frames that may be so large; others are a short header alone.
    """
    token, size = PREFIX.unpack(_read(connection, PREFIX.size, deadline))
    if expected is not None and token != expected:
        max_header, max_bytes = MAX_NOTE, 0
    if size > max_header:
        raise FrameError(f"a header of {size} bytes; expected at most {max_header}")
    try:
        header = _loads(_read(connection, size, deadline).decode())
        sizes = header.pop("blobs")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FrameError(f"a header that is not JSON with blobs: {type(error).__name__}") from None
    sound = isinstance(sizes, list) and len(sizes) <= MAX_BLOBS and all(type(n) is int and n >= 0 for n in sizes)
    if not sound or sum(sizes) > max_bytes:
        raise FrameError(f"blobs that are malformed or exceed {max_bytes} bytes")
    return Frame(token, header, [_read(connection, n, deadline) for n in sizes])


def arrives(connection: socket.socket, deadline: float) -> bool:
    """Waits until there is something to read, or the other end is gone; False when the deadline comes first."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(max(deadline - _monotonic(), 0.0) * 1e3))


def _arm(connection: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        connection.settimeout(None)
        return
    left = deadline - _monotonic()
    if left <= 0:
        raise DeadlineError("no time left")
    connection.settimeout(left)


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        _arm(connection, deadline)
        try:
            count = connection.recv_into(view)
        except TimeoutError:
            raise DeadlineError(f"{len(view)} bytes are missing") from None
        except OSError as error:
            raise Closed(str(error)) from None
        if count == 0:
            raise Closed(f"{len(view)} bytes are missing")
        view = view[count:]
    return data
