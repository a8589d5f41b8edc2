"""Images that look like something: clouds of all sizes, with discs on them, each different."""

import functools
import io

import numpy as np
from PIL import Image, ImageDraw


@functools.cache
def picture(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in 8 * random.integers(20, 40, 2))
    slow = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    slow[0, 0] = 1
    waves = np.fft.fft2(random.normal(size=(3, height, width))) / slow
    clouds = np.fft.ifft2(waves).real
    low, high = (side.reshape(3, 1, 1) for side in (clouds.min((1, 2)), clouds.max((1, 2))))
    image = Image.fromarray((255 * (clouds - low) / (high - low)).astype(np.uint8).transpose(1, 2, 0).copy())
    draw = ImageDraw.Draw(image)
    for _ in range(int(random.integers(0, 6))):
        x, y, radius = (int(random.integers(1, most)) for most in (width, height, 60))
        colour = (int(random.integers(255)), int(random.integers(255)), int(random.integers(255)))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return image


def file_of(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))
