"""Small images out of files that anybody may have made."""

import io

from PIL import Image

from hdpo_jax.data.images import ImageError, check_file
from models.qwen3_vl.pixels import load_image


def picture(data: bytes) -> Image.Image:
    """The image in a file, upright, in RGB. Raises ValueError, one line.

    Decompression bombs are refused before they are unpacked, and formats whose readers start programs.
    """
    try:
        check_file(data)
    except ImageError as error:
        raise ValueError(f"the file {error}") from error
    return load_image(data)


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image with no side longer than `side`; smaller ones stay as they are."""
    small = image.copy()
    small.thumbnail((side, side))
    return small


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
