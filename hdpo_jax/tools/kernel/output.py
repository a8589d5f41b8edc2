"""Standard output and error of one call, bounded: head and tail are kept, the middle is counted."""

import io
import os
import threading

_fstat, _pread, _ftruncate, _write, _getpid = os.fstat, os.pread, os.ftruncate, os.write, os.getpid

LATE = "[The above was printed after the last call had returned.]\n"


class Output(io.TextIOBase):
    """The text stream behind `sys.stdout` and `sys.stderr`.

    What subprocesses and C code write to the descriptors 1 and 2 goes to `descriptor`, an appending file, and is taken
    over whenever Python writes or the call ends, so the order of both is kept. Threads may share it; what a fork of
    this process writes goes to the file too.
    """

    def __init__(self, limit: int, descriptor: int):
        """`limit`: characters kept of one call."""
        self._half = max(limit // 2, 1)
        self._window = 4 * self._half
        self._descriptor = descriptor
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._taken_over = 0
        self._clear()

    def _clear(self) -> None:
        self._head: list[str] = []
        self._head_size = 0
        self._tail: list[str] = []
        self._tail_size = 0
        self._cut = 0

    def release(self) -> None:
        """Closes the file; nothing can be written any more."""
        os.close(self._descriptor)

    @property
    def encoding(self) -> str:
        return "utf-8"

    @property
    def buffer(self) -> io.RawIOBase:
        return _Bytes(self)

    def fileno(self) -> int:
        return 1

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if _getpid() == self._process:
            with self._lock:
                self._take_over()
                self._add(text)
            return len(text)
        # In a fork, whose memory nobody reads, and where a thread that is not there may hold the lock.
        data = text.encode(errors="replace")
        while data:
            data = data[_write(self._descriptor, data) :]
        return len(text)

    def mark_late(self) -> None:
        """Says of what was written since the last `take` that it came between the calls."""
        with self._lock:
            self._take_over()
            last = (self._tail or self._head)[-1:]
            if last:
                self._add(LATE if last[0].endswith("\n") else f"\n{LATE}")

    def take(self) -> str:
        """The text since the last call of this method."""
        with self._lock:
            self._take_over()
            if self._taken_over > self._window:
                _ftruncate(self._descriptor, 0)
                self._taken_over = 0
            tail = "".join(self._tail)
            surplus = max(len(tail) - self._half, 0)
            cut = self._cut + surplus
            marker = f"\n[… {cut} characters cut …]\n" if cut else ""
            text = "".join(self._head) + marker + tail[surplus:]
            self._clear()
            return text

    def _add(self, text: str) -> None:
        room = self._half - self._head_size
        if room > 0:
            self._head.append(text[:room])
            self._head_size += len(self._head[-1])
            text = text[room:]
        if not text:
            return
        if len(text) > self._half:
            self._cut += len(text) - self._half
            text = text[-self._half :]
        self._tail.append(text)
        self._tail_size += len(text)
        if self._tail_size > 4 * self._half or len(self._tail) > 8 * self._half:
            kept = "".join(self._tail)[-self._half :]
            self._cut += self._tail_size - len(kept)
            self._tail, self._tail_size = [kept], len(kept)

    def _take_over(self) -> None:
        size = _fstat(self._descriptor).st_size
        pending = size - self._taken_over
        window = self._window
        if pending <= 2 * window:
            if pending > 0:
                self._add(_pread(self._descriptor, pending, self._taken_over).decode(errors="replace"))
        else:
            self._add(_pread(self._descriptor, window, self._taken_over).decode(errors="replace"))
            self._cut += pending - 2 * window
            self._add(_pread(self._descriptor, window, size - window).decode(errors="replace"))
        self._taken_over = size


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, output: Output):
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        data = bytes(data)
        self._output.write(data.decode(errors="replace"))
        return len(data)
