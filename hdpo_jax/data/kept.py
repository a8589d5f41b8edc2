"""What was encoded once and is kept for the next epoch, within a budget of host memory."""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Kept(Generic[T]):
    """Values by id. The first that fit stay: epochs are shuffled, so no other choice would be hit more often.

    Threads may share it. A copy for another process keeps nothing: the budget is that of this process.
    """

    def __init__(self, megabytes: int):
        self._room = megabytes * 2**20
        self._values: dict[str, T] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> "tuple[type[Kept[T]], tuple[int]]":
        return type(self), (0,)

    def get(self, id: str, make: Callable[[], T]) -> T:
        """The value kept under `id`; or a new one, kept where there is room."""
        if id in self._values:
            return self._values[id]
        value = make()
        with self._lock:
            if id not in self._values and value.nbytes <= self._room:
                self._room -= value.nbytes
                self._values[id] = value
        return value
