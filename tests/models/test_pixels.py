"""Pixels against transformers' own image processor (exactly equal), and files that should not be trusted."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.qwen3_vl import pixels
from models.qwen3_vl.pixels import ImageSettings, encode_image, load_image

HUB = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16} | {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SMALL = HUB | {"size": {"longest_edge": 64 * 64, "shortest_edge": 64 * 64}}
ODD = {
    "min_pixels": 900,
    "max_pixels": 5000,
    "patch_size": 6,
    "temporal_patch_size": 3,
    "merge_size": 3,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "resample": 2,
}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def assert_same_numbers(image: Image.Image, settings: dict) -> None:
    expected = Qwen2VLImageProcessorPil(**settings)(images=[image], return_tensors="np")
    found = encode_image(image, ImageSettings.from_dict(settings))
    assert found.grid == tuple(expected["image_grid_thw"][0])
    assert found.patches.dtype == np.float32
    np.testing.assert_array_equal(found.patches, expected["pixel_values"])


@pytest.mark.parametrize("settings", [HUB, SMALL, ODD, {}], ids=["hub", "small", "odd", "defaults"])
@pytest.mark.parametrize("size", [(512, 512), (37, 211), (640, 45), (1, 1), (3, 500), (64, 64)])
def test_shapes(settings, size):
    assert_same_numbers(noise(*size), settings)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes(mode):
    assert_same_numbers(noise(70, 50, mode), SMALL)


def test_other_kinds_of_images():
    palette = noise(70, 50).convert("P", palette=Image.Palette.ADAPTIVE)
    with_hole = Image.open(io.BytesIO(png(palette, transparency=3)))
    grey_with_hole = Image.open(io.BytesIO(png(noise(70, 50, "L"), transparency=200)))
    bilevel = noise(70, 50, "L").convert("1")
    deep = Image.fromarray(np.arange(3500, dtype=np.uint16).reshape(50, 70))
    assert with_hole.info["transparency"] and grey_with_hole.info["transparency"]
    for image in (palette, with_hole, grey_with_hole, bilevel, deep):
        assert_same_numbers(image, SMALL)


def test_transparency_is_white():
    patches = encode_image(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), ImageSettings.from_dict(SMALL)).patches
    np.testing.assert_array_equal(patches, 1)  # (1 - 0.5) / 0.5; the red underneath would give -1 in two channels


def test_too_narrow_is_one_line():
    settings = ImageSettings.from_dict(HUB)
    assert encode_image(noise(2, 400), settings).grid[2] == 2
    with pytest.raises(ValueError, match="image of 1 x 201 pixels; expected sides of at most 200 to 1"):
        encode_image(noise(1, 201), settings)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"do_resize": False}, "turn do_resize off"),
        ({"size": {"shortest_edge": 5000, "longest_edge": 100}}, "images of 5000 to 100 pixels"),
    ],
)
def test_settings_that_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings.from_dict(raw)


def test_min_and_max_pixels_win_over_size():
    settings = ImageSettings.from_dict({"size": HUB["size"], "max_pixels": 70_000})
    assert (settings.min_pixels, settings.max_pixels) == (65536, 70_000)
    assert ImageSettings.from_dict({"size": None}) == ImageSettings()


def upside_down_jpeg() -> bytes:
    image = noise(40, 24)
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [png(noise(30, 20)), png(noise(30, 20, "RGBA")), png(noise(30, 20, "L")), upside_down_jpeg()],
    ids=["rgb", "alpha", "grey", "exif"],
)
def test_loads_what_transformers_loads(content, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = np.asarray(transformers_load_image(str(path)))
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (content, path, str(path), uri):
        found = load_image(source)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"not an image", "image of 12 bytes can not be decoded: expected one of JPEG, PNG"),
        (b"", "image of 0 bytes can not be decoded"),
        (png(noise(200, 200))[:5000], "can not be decoded: image file is truncated"),
        ("data:image/png;base64,AAAA####", "is not base64; expected data:image/png;base64"),
        ("data:image/png", "holds no data"),
        ("https://example.com/a.png", "is a web address; expected a path or a data URI"),
        ("/nowhere/a.png", "'/nowhere/a.png' can not be read: No such file or directory"),
        ("x" * 5000, "can not be read: File name too long"),
    ],
)
def test_bad_images_are_one_line(source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_image(source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    # One bit a pixel: 45 kB of PNG that would take 400 MB as RGB… here with a lower limit, to be quick.
    monkeypatch.setattr(pixels, "MAX_PIXELS", 10_000)
    bomb = png(Image.new("1", (101, 100)))
    with pytest.raises(ValueError, match="has 101 x 100 pixels; expected at most 10,000"):
        load_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # Pillow itself raises from twice its limit on
    with pytest.raises(ValueError, match="has too many pixels"):
        load_image(bomb)


def test_formats_whose_readers_start_programs_are_refused():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(ValueError, match="expected one of JPEG, PNG") as refusal:
        load_image(file.getvalue())
    assert "\n" not in str(refusal.value)
