"""Functions as a user writes them, good ones and bad ones."""

from __future__ import annotations

import asyncio
import enum
import functools
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from hdpo_jax.tools import Subject
from hdpo_jax.types import Observation

release = threading.Event()
"""Lets `hang` return."""
cancelled: list[str] = []


@dataclass
class Point:
    x: int
    y: int = 0


class Options(TypedDict):
    unit: Literal["C", "F"]


class Place(BaseModel):
    name: str
    at: Point | None = None


def weather(
    city: str,
    days: Annotated[int, Field(ge=1, le=7)] = 1,
    options: Options | None = None,
    when: Annotated[date | None, "The day, as in 2024-05-06."] = None,
) -> str:
    """Says how the weather will be.

    Of cities only.

    Args:
        city: Where, in English.
        days: How many.

    Returns:
        A sentence.
    """
    unit = options["unit"] if options else "C"
    return f"{city}: {days} days in {unit}, {when.isoformat() if when else 'today'}"


def route(places: list[Place], weights: dict[str, float], copy: bool = True) -> dict[str, Any]:
    """Finds a way.

    Parameters
    ----------
    places : list[Place]
        In this order.
    """
    assert all(isinstance(place, Place) for place in places)
    return {"places": places, "weights": weights, "copy": copy}


def shout(text: str, *, times: int = 2) -> str:
    """Shouts.

    :param text: What.
    """
    return text.upper() * times


async def later(seconds: float) -> str:
    """Waits."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        cancelled.append(f"{seconds:g}")
        raise
    return "waited"


def look(which: int = 0, subject: Subject | None = None) -> list[Any]:
    """Says how large an image is."""
    assert subject is not None
    return [f"{len(subject.images[which])} bytes, of {subject.keys[0]}"]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@functools.cache
def paint(colour: Colour, size: tuple[int, int]) -> list[Any]:
    """Paints."""
    image = Image.new("RGB", size, colour.value)
    return ["painted", image, {"size": size}, image]


@dataclass
class Report:
    total: float
    parts: list[Point] = field(default_factory=list)


def give(kind: str) -> Any:
    """Gives back one of many kinds."""
    values = {
        "none": None,
        "text": "grüße 漢",
        "half": "a\ud800b",
        "list": ["a", "b"],
        "dataclass": Report(total=float("inf"), parts=[Point(1)]),
        "numpy": {"mean": np.float32(1.5), "all": np.arange(3)},
        "observation": Observation(text="x" * 10_000, images=[Image.new("L", (3, 2))] * 9, ok=False),
        "image": Image.new("RGBA", (3, 2), (255, 0, 0, 0)),
        "images": [Image.new("RGB", (3, 2))] * 5,
        "thing": object(),
    }
    return values[kind]


def fail(how: str) -> None:
    """Fails."""
    if how == "exit":
        sys.exit("bye")
    if how == "time":
        raise TimeoutError("the other side is slow")
    if how == "long":
        raise ValueError("y" * 10_000)
    raise KeyError("nothing")


def hang() -> str:
    """Does not come back."""
    release.wait()
    return "released"


def nap() -> float:
    """Sleeps a little."""
    time.sleep(0.3)
    return 0.3


def no_docstring(a: int) -> int:
    return a


def no_hint(a, b: int = 0):
    """Has no hint."""


def many(*numbers: int):
    """Takes any number."""


def rest(**numbers: int):
    """Takes any name."""


def by_place(number: int, /):
    """Has no names."""


def unknown_type(thing: threading.Event):
    """Takes what JSON has not."""


def unresolved(thing: Any):
    """Has a hint that means nothing."""


unresolved.__annotations__["thing"] = "NoSuchType"


def search(query: str) -> str:
    """Has a name that is taken."""
    return query


größe = shout
NUMBER = 3


def _named(name: str):
    def inner(a: int) -> int:
        """Has a name of its own."""
        return a

    inner.__name__ = name
    return inner


strange = _named("größe")
double = _named("weather")
