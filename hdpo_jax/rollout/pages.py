"""Which pages of a lane are free, and how many rows hold the others."""

from collections.abc import Iterable, Sequence


class PagePool:
    """Page numbers from 1 on; page 0 belongs to nobody. A page is free again when its last holder drops it."""

    def __init__(self, pages: int):
        self._free = list(range(pages - 1, 0, -1))
        self._holders = [0] * pages
        self.peak = 0
        """The most pages that were held at a time."""

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._holders) - 1 - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Pages for a new holder; None, and nothing taken, where there are too few."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        self.peak = max(self.peak, self.held)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One holder more for each."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less for each."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
