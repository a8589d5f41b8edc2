"""Images as sessions see and show them: upright, RGB, of bounded size."""

import io

from PIL import Image, ImageOps

MAX_PIXELS = 1 << 24
"""Of one image that is shown: as many as the model takes in at most. A larger one is reduced."""
CALL_PIXELS = 2 * MAX_PIXELS
"""Of all images of one call; those beyond are dropped."""


def opened(data: bytes | bytearray) -> Image.Image:
    """An image as the policy saw it: upright, RGB. Plain RGB files are decoded at first use."""
    image = Image.open(io.BytesIO(data))
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """Transparency becomes white, as on paper."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
