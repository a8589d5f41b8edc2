"""What goes over the wire: prompts' files as they are, observations' images to the pixel."""

import base64
import io

import pytest
from PIL import Image
from pydantic import ValidationError

from hdpo_jax.tools.wire import ActionBatch, ExtraFields, data_uri, decoded_image, image_file, image_uri, problem

BOUND = 1_000_000


def encoded(format: str, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert(mode).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(("format", "media"), [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("MPO", "jpeg")])
def test_files_that_servers_take_are_sent_as_they_are(format: str, media: str):
    file = encoded(format)
    uri = data_uri(file)
    assert uri.startswith(f"data:image/{media};base64,") and image_file(uri, BOUND) == file


def test_other_files_are_sent_as_png_upright():
    turned = Image.Exif()
    turned[0x0112] = 6
    uri = data_uri(encoded("TIFF", exif=turned))
    assert uri.startswith("data:image/png;base64,") and decoded_image(uri, BOUND).size == (30, 40)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1"])
def test_observations_keep_their_pixels(mode: str):
    image = Image.effect_noise((40, 30), 90).convert(mode)
    found = decoded_image(image_uri(image), BOUND)
    assert found.mode == "RGB" and found.tobytes() == image.convert("RGB").tobytes()


def test_files_are_measured_before_they_are_decoded():
    uri = data_uri(encoded("PNG"))
    size = len(base64.b64decode(uri.partition(",")[2]))
    assert image_file(uri, size)
    with pytest.raises(ValueError, match=f"is larger than {size - 4:,} bytes"):
        image_file(uri, size - 4)


def test_a_broken_image_is_told_in_words():
    file = encoded("PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file[: len(file) // 2]).decode()}"
    with pytest.raises(ValueError, match="^can not be decoded: "):
        decoded_image(uri, BOUND)


def test_questions_are_known_by_what_data_sets_call_them():
    assert ExtraFields.model_validate({"index": 7, "answer": "B", "data_idx": "q"}).names() == ["q", "7"]
    assert ExtraFields(keys=["a", "b"]).names() == ["a", "b"]


def test_problems_repeat_little_of_what_was_sent():
    with pytest.raises(ValidationError) as error:
        ActionBatch.model_validate({"trajectory_ids": ["secret" * 100], "actions": [""]})
    said = problem(error.value)
    assert said == "trajectory_ids[0]: String should have at most 256 characters"
