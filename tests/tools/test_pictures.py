"""Images that are meant to hurt: as a prompt's, opened by code, shown by code."""

import struct
import zlib

import pytest

from hdpo_jax.tools.kernel.pictures import CALL_PIXELS, MAX_PIXELS
from models.qwen3_vl.pixels import load_image

pytestmark = pytest.mark.requires_bwrap


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that unpacks to one byte for eight of so many pixels."""
    rows = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    data = b"".join([*(rows.compress(line) for _ in range(min(height, 2_000))), rows.flush()])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_bomb_as_the_prompts_image(box, run, picture):
    """50,000 x 50,000 pixels: named and left out, on the host as in the session; the other image is there."""
    with pytest.raises(ValueError, match="too many pixels"):
        load_image(bomb(50_000, 50_000))
    with box.session([bomb(50_000, 50_000), picture]) as session:
        text = run(session, "image_2.size").text
        assert "image_1 is missing" in text and "decompression bomb" in text and text.endswith("(120, 80)")


def test_an_image_that_is_too_large_to_use_but_not_to_open(box, run):
    """13,000 x 13,000 pixels are let through by Pillow, and take twice the session's memory as RGB."""
    with box.session([bomb(13_000, 13_000)]) as session:
        observation = run(session, "image_1.convert('RGB')")
        assert "image_1 is missing: MemoryError" in observation.text
        assert not observation.ok and not observation.images
        assert run(session, "1 + 1").text == "2"


def test_a_bomb_that_code_opens(session, run):
    code = f"import io\ndata = {bomb(50_000, 50_000)!r}\nImage.open(io.BytesIO(data))"
    assert "DecompressionBombError" in run(session, code).text
    observation = run(session, "Image.MAX_IMAGE_PIXELS = None\ndisplay(Image.open(io.BytesIO(data)))")
    assert not observation.ok and not observation.lost and not observation.images
    assert run(session, "1 + 1").text == "2"


def test_a_bomb_that_shows_itself(session, run):
    """Objects may hand `display` a file, which is opened for them."""
    code = f"class Bomb:\n    def _repr_png_(self): return {bomb(50_000, 50_000)!r}\ndisplay(Bomb())"
    assert not run(session, code).images
    assert run(session, "1 + 1").text == "2"


def test_images_of_a_call_are_bounded_together(session, run):
    """Each may have what the model takes in at most, two of them together; the third is left out whole."""
    observation = run(session, "for _ in range(3): display(Image.new('L', (4096, 4096)))")
    sizes = [image.size for image in observation.images]
    assert sizes == [(4096, 4096)] * 2
    assert sum(width * height for width, height in sizes) <= CALL_PIXELS == 2 * MAX_PIXELS
    assert "1 more images are left out" in observation.text


@pytest.mark.parametrize("code", ["Image.new('RGB', (0, 5))", "plt.figure(figsize=(2000, 2000)); plt.show()"])
def test_images_that_can_not_be(session, run, code: str):
    observation = run(session, code)
    assert not observation.ok and not observation.lost and not observation.images
    assert run(session, "1 + 1").text == "2"
