import dataclasses
import threading

import pytest
from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools.crops import cropped
from hdpo_jax.tools.python_sandbox import PythonSession, PythonTool

ANSWERED = [
    "image_1.crop((10, 20, 26, 30))",
    " image_1.crop([10, 20, 26, 30])\n",
    "image_1.crop((-5, -5, 5, 5))",
    "image_1.crop((100, 60, 140, 100))",
    "image_1.crop((10, 20, 26, 30)).resize((64, 40))",
    "image_1.resize((12, 8)).crop((0, 0, 4, 4))",
]
LEFT_TO_A_SESSION = [
    "image_1",
    "image_2.crop((0, 0, 1, 1))",
    "image_0.crop((0, 0, 1, 1))",
    "image_1.crop((0, 0, 0, 5))",
    "image_1.crop((5, 5, 1, 1))",
    "image_1.crop((0, 0, 10**6, 5))",
    "image_1.crop((0, 0, 100000, 100000))",
    "image_1.crop((0, 0, 1.5, 5))",
    "image_1.crop((0, 0, True, 5))",
    "image_1.crop((0, 0, 5))",
    "image_1.crop(box=(0, 0, 5, 5))",
    "image_1.resize((0, 5))",
    "image_1.rotate((90, 90))",
    "image_1.crop((0, 0, 5, 5)).save('x')",
    "image_1.crop((0, 0, f(), 5))",
    "x = image_1.crop((0, 0, 5, 5))",
    "image_1.crop((0, 0, 5, 5)); 1",
    "image_1.crop((0, 0, 5, 5))\nprint(1)",
    "image_1.crop(" * 90,
    "other.crop((0, 0, 5, 5))",
]


@pytest.mark.requires_bwrap
def test_the_answers_are_those_of_a_session(box, session, run, picture):
    for code in ANSWERED:
        expected = run(session, code)
        image = cropped(code, [picture])
        assert image is not None and expected.ok and expected.text == ""
        assert image.mode == "RGB" and image.size == expected.images[0].size
        assert image.tobytes() == expected.images[0].tobytes(), code


@pytest.mark.parametrize("code", LEFT_TO_A_SESSION)
def test_everything_else_is_left_to_a_session(code: str, picture: bytes):
    assert cropped(code, [picture]) is None


def test_a_file_that_is_no_image_is_left_to_a_session():
    assert cropped("image_1.crop((0, 0, 5, 5))", [b"junk"]) is None


@pytest.mark.requires_bwrap
def test_a_session_that_runs_answers_for_itself(box, picture):
    """`image_1` may be something else by then: here black, where the original has (3, 4, 7)."""
    tool = box.tool("python")
    assert isinstance(tool, PythonTool)
    config = dataclasses.replace(ToolsConfig(), crop_in_process=True)
    session = PythonSession(config, tool.server, threading.BoundedSemaphore(), [picture])
    crop = {"code": "image_1.crop((3, 4, 5, 6))"}
    assert session.call(crop).images[0].getpixel((0, 0)) == (3, 4, 7)
    session.call({"code": "image_1 = Image.new('RGB', (9, 9))"})
    assert session.call(crop).images[0].getpixel((0, 0)) == (0, 0, 0)
    assert isinstance(session.call(crop).images[0], Image.Image)
    session.close()
