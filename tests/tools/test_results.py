"""What tools give back is bounded, and image files of unknown origin are read with care."""

import io
import struct
import zlib

import pytest
from PIL import Image

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools import results
from hdpo_jax.tools.results import bounded_text, decoded_image, observation

CONFIG = ToolsConfig(output_chars=100, max_images=2)


def file_of(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its 20 bytes of data hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_text_keeps_head_and_tail():
    assert bounded_text("abc", 3) == "abc"
    assert bounded_text("a" * 10 + "b" * 5 + "c" * 10, 20) == "a" * 10 + "\n[… 5 characters cut …]\n" + "c" * 10
    assert bounded_text("a\ud800", 10) == "a?"


def test_images_are_copies_in_rgb_within_the_budget():
    source = Image.new("L", (8192, 4096), 200)
    (found,) = observation([source], CONFIG).images
    assert found.size == (5792, 2896) and found.mode == "RGB"  # at most 2**24 pixels, of the same shape
    small = Image.new("RGB", (2, 2))
    (found,) = observation([small], CONFIG).images
    small.putpixel((0, 0), (9, 9, 9))
    assert found.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(("size", "expected"), [((40, 10), (20, 5)), ((1, 1000), (1, 100)), ((1000, 1), (100, 1))])
def test_images_of_any_shape_are_reduced(monkeypatch, size, expected):
    monkeypatch.setattr(results, "MAX_PIXELS", 100)
    (found,) = observation([Image.new("L", size)], CONFIG).images
    assert found.size == expected


def test_an_image_that_is_left_out_takes_its_place():
    """Else a server could have any number of broken files looked at."""
    parts = [b"broken", "text", Image.new("RGB", (2, 2)), b"broken too", Image.new("L", (1 << 13, (1 << 13) + 1))]
    found = observation(parts, CONFIG)
    assert len(found.images) == 1
    assert found.text.splitlines() == [
        "text",
        "[image left out: expected a file of type PNG, JPEG, WEBP, GIF, BMP]",
        "[2 more images are left out: one call returns 2 at most.]",
    ]
    (said,) = observation([Image.new("L", (1 << 13, (1 << 13) + 1))], CONFIG).text.splitlines()
    assert said == "[image left out: it has 8192 x 8193 pixels; expected at most 67,108,864]"


def test_nothing_is_said():
    assert observation([], CONFIG).text == observation([""], CONFIG).text == "(no output)"
    assert observation([Image.new("L", (1, 1))], CONFIG).text == ""


def test_files_are_shown_upright_on_white():
    turned = Image.new("RGB", (20, 10), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded_image(file_of(turned, "JPEG", exif=exif)).size == (10, 20)
    clear = decoded_image(file_of(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG"))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected a file of type PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected a file of type PNG"),
        (file_of(Image.new("L", (8, 8)), "TIFF"), "expected a file of type PNG"),
        (png_of_claimed_size(9_000, 9_000), "it has 9000 x 9000 pixels; expected at most 67,108,864"),
        (png_of_claimed_size(60_000, 60_000), "it has too many pixels; expected at most 67,108,864"),
        (file_of(Image.effect_noise((99, 99), 50).convert("RGB"), "PNG")[:900], "it can not be decoded: "),
    ],
    ids=["empty", "postscript", "tiff", "large", "bomb", "cut"],
)
def test_what_is_no_image_or_too_large_a_one_is_named(data, words):
    with pytest.raises(ValueError, match=words):
        decoded_image(data)
    (said,) = observation([data], CONFIG).text.splitlines()
    assert words in said and not observation([data], CONFIG).images
