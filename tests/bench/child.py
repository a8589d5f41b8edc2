"""The sides of a comparison, each in a process of its own: neither memory nor threads mix, and they take turns."""

import re
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, Self, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Child:
    """A fresh interpreter that runs functions of a benchmark's module, one after another.

    Functions are found by name, so they stand at the top level of their module; the child imports it first, so what
    only one side needs (torch, jax) is imported inside its functions. What a function keeps (`functools.cache`) is
    there for the next call.
    """

    def __init__(self):
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """What `function` returns there; what it raises is raised here."""
        return self._pool.submit(function, *args, **kwargs).result()

    def peak_bytes(self) -> int:
        """The most memory that the child has had so far."""
        return self.call(peak_bytes)


def peak_bytes() -> int:
    """The most memory that this process has had so far.

    Linux starts getrusage's figure at the size of the process that this one was started from; its own is in /proc.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(function: Callable[..., Mapping[str, Any]], arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `function(**arguments)` returns in a fresh interpreter, and with it the `peak_bytes` of that."""
    with Child() as child:
        return {**child.call(function, **(arguments or {})), "peak_bytes": child.peak_bytes()}


def take_turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side returned in each round. Every other round goes backwards: a machine that slows down hits all."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(sides[name]())
    return found


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of over / under: what both sides suffer from in a round falls out."""
    return median(above / below for above, below in zip(over, under, strict=True))
