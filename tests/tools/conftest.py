"""One sandbox for all tests of a module: it takes a second or two to start."""

import io
import os
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import Session, ToolBox
from hdpo_jax.types import Observation, ToolCall

SECRET = "correct-horse-battery-staple"
CONFIG = ToolsConfig(
    timeout_seconds=10,
    memory_mb=256,
    processes=12,
    disk_mb=8,
    output_chars=2_000,
    max_images=3,
    workers=8,
)

Run = Callable[[Session, str], Observation]


@pytest.fixture(scope="module")
def box() -> Iterator[ToolBox]:
    os.environ["HDPO_TEST_TOKEN"] = SECRET
    try:
        with ToolBox(CONFIG) as box:
            yield box
    finally:
        del os.environ["HDPO_TEST_TOKEN"]


@pytest.fixture
def session(box: ToolBox, picture: bytes) -> Iterator[Session]:
    with box.session([picture]) as session:
        yield session


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A 120x80 PNG whose red channel is the column and whose green channel is the row."""
    image = Image.new("RGB", (120, 80))
    image.putdata([(x, y, 7) for y in range(80) for x in range(120)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def run() -> Run:
    def call(session: Session, code: str) -> Observation:
        return session.call(ToolCall(name="python", arguments={"code": code}))

    return call
