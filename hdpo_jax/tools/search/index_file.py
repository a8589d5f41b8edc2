"""Indices as SQLite files: written beside their place and renamed into it, read by many threads."""

import contextlib
import queue
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from hdpo_jax.config import ConfigError
from hdpo_jax.files import replacing

CACHE_KIB = 65_536
"""Of pages that a writing connection keeps."""


@contextlib.contextmanager
def writing(path: Path, kind: int) -> Iterator[sqlite3.Connection]:
    """A connection to a new file that takes `path`'s place on success; `kind` says what `IndexFile` may find in it."""
    with (
        replacing(path) as temporary,
        contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection,
    ):
        # Nobody else sees the file before it is whole, and after a crash it is thrown away.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute(f"PRAGMA application_id = {kind}")
        connection.execute("BEGIN")
        yield connection
        connection.execute("COMMIT")


class IndexFile:
    """A finished index. A connection serves one thread at a time, and the next thread after it."""

    def __init__(
        self,
        path: str,
        kind: int,
        *,
        setting: str,
        command: str,
        prepare: Callable[[sqlite3.Connection], object] = lambda connection: None,
    ):
        """`prepare` is given each new connection.

        Raises ConfigError, one line that names `setting` and the `command` that writes such files.
        """
        if not path:
            raise ConfigError(f"{setting} is ''; expected the file that `{command}` wrote")
        if not Path(path).is_file():
            raise ConfigError(f"{setting}: there is no file {path}; `{command}` writes it")
        self._uri = f"file:{quote(str(Path(path).absolute()))}?mode=ro&immutable=1"
        self._prepare = prepare
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._closed = False
        try:
            with self.connection() as connection:
                (found,) = connection.execute("PRAGMA application_id").fetchone()
        except sqlite3.DatabaseError:
            found = None
        if found != kind:
            self.close()
            raise ConfigError(f"{setting}: {path} is another kind of file; expected one that `{command}` wrote")

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A read-only connection that is this thread's alone for the time of the block."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = sqlite3.connect(self._uri, uri=True, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        try:
            yield connection
        finally:
            self._idle.put(connection)
            if self._closed:
                self.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()
