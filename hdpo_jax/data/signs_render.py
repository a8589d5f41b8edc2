"""Pictures for the built-in task: boards that look a little like photographs, with signs on them.

Everything is drawn at full resolution. Small text is drawn large and reduced, so that a small inscription
seen at full resolution looks like a large one seen through the policy's reduced view.
"""

import functools
import io
import os
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""
Color = tuple[int, int, int]

FONTS = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
"""Faces that matplotlib ships, so that no system font is needed; of one width, as on number plates."""

PLATE_COLORS: dict[str, Color] = {
    "red": (120, 20, 24),
    "green": (12, 78, 34),
    "blue": (22, 38, 128),
    "purple": (84, 22, 104),
    "brown": (92, 54, 18),
    "black": (28, 28, 30),
}
"""Dark, so that a plate of a few policy pixels still stands out from any background."""

DICE = {"1": (4,), "2": (0, 8), "3": (0, 4, 8), "4": (0, 2, 6, 8), "5": (0, 2, 4, 6, 8), "6": (0, 2, 3, 5, 6, 8)}
"""Where the dots stand in a field of three by three places, counted row by row."""

_CAP_HEIGHT = 0.729  # of the em, in every DejaVu face
_SMALL_TEXT = 24  # glyphs below this height are drawn at _OVERSAMPLE times the size, then reduced
_OVERSAMPLE = 8
_BANK_SIDE = 1024


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A plate with an inscription."""

    inscription: str
    color: str
    """A name of PLATE_COLORS."""
    box: Box
    """The plate."""


def fonts_directory() -> str:
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf")


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = os.path.join(fonts_directory(), f"{name}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def text_mask(text: str, font: str, height: float, shift: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Coverage of `text` in capitals `height` px high, as a grey image that fits it tightly.

    `shift` moves small text by a fraction of a pixel: real signs do not lie on the pixel grid.
    """
    scale = _OVERSAMPLE if height < _SMALL_TEXT else 1
    face = _font(font, round(height * scale / _CAP_HEIGHT))
    spacing = round(0.12 * height * scale)
    advances = [round(face.getlength(letter)) + spacing for letter in text]
    width, capital = sum(advances) - spacing, round(height * scale)
    # A margin of one reduced pixel on every side holds the antialiased edge and the shift.
    columns, rows = -(-width // scale) + 2, -(-capital // scale) + 2
    mask = Image.new("L", (columns * scale, rows * scale))
    draw = ImageDraw.Draw(mask)
    x = (columns * scale - width) // 2 + round(shift[0] * scale)
    baseline = (rows * scale + capital) // 2 + round(shift[1] * scale)
    for letter, advance in zip(text, advances, strict=True):
        draw.text((x, baseline), letter, font=face, fill=255, anchor="ls")
        x += advance
    return mask if scale == 1 else mask.resize((columns, rows), Image.Resampling.BICUBIC)


def dots_mask(counts: str, height: float, rng: np.random.Generator) -> Image.Image:
    """Coverage of square fields `height` px high with as many dots as the digits say, as on dice, each field turned."""
    scale = _OVERSAMPLE if height < _SMALL_TEXT else 1
    pitch = height / 3
    advance = 4 * pitch  # a field, and a third of one between two
    columns, rows = round(advance * len(counts) - pitch) + 2, round(height) + 2
    mask = Image.new("L", (columns * scale, rows * scale))
    draw = ImageDraw.Draw(mask)
    for field, count in enumerate(counts):
        turned = rng.random() < 0.5
        for place in DICE[count]:
            place = 3 * (place % 3) + 2 - place // 3 if turned else place  # a quarter turn
            x = 1 + field * advance + (place % 3 + 0.5) * pitch
            y = 1 + (place // 3 + 0.5) * pitch
            box = (x - 0.42 * pitch, y - 0.42 * pitch, x + 0.42 * pitch, y + 0.42 * pitch)
            draw.ellipse([side * scale for side in box], fill=255)
    return mask if scale == 1 else mask.resize((columns, rows), Image.Resampling.BICUBIC)


def letters_mask(text: str, height: float, rng: np.random.Generator) -> Image.Image:
    """Coverage of `text` in a random face, off the pixel grid by a random fraction."""
    return text_mask(text, FONTS[rng.integers(len(FONTS))], height, tuple(rng.uniform(-0.5, 0.5, 2)))


def paint_sign(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    text: str,
    dots: bool,
    color: str,
    center: tuple[int, int],
    height: float,
    plate: tuple[int, int] | None,
    contrast: float,
) -> Sign:
    """Draws a sign on `image`, moved inward if it would stick out of it.

    Args:
        text: letters; or, where `dots`, digits that say how many dots each field has.
        height: of the capitals or fields, px.
        plate: width and height of the plate, px; None fits it to the text.
        contrast: how much brighter than its plate the text is, in grey levels.
    """
    mask = (dots_mask if dots else letters_mask)(text, height, rng)
    if plate is None:
        plate = (mask.width + round(0.45 * height), mask.height + round(0.6 * height))
    width, tall = max(plate[0], mask.width + 4), max(plate[1], mask.height + 4)
    left = int(np.clip(center[0] - width // 2, 2, image.width - width - 2))
    top = int(np.clip(center[1] - tall // 2, 2, image.height - tall - 2))
    box = (left, top, left + width, top + tall)

    plate_color = _shade(PLATE_COLORS[color], rng.uniform(-10, 10))
    brightness = _luma(plate_color) + contrast
    tint = rng.uniform(-14, 14, 3)
    text_color = _color(brightness + tint - _luma(tuple(tint)))
    radius = int(rng.integers(2, 7))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:  # a post below, as many signs have
        x = (box[0] + box[2]) // 2
        draw.rectangle((x - 2, box[3], x + 2, min(box[3] + 30, image.height)), fill=(120, 120, 122))
    draw.rounded_rectangle((box[0], box[1], box[2] - 1, box[3] - 1), radius, fill=plate_color)
    image.paste(text_color, ((box[0] + box[2] - mask.width) // 2, (box[1] + box[3] - mask.height) // 2), mask)
    return Sign(inscription=text, color=color, box=box)


def paint_background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A scene without signs, brighter than any plate: sky, wall, blurred lights or a street."""
    paint = (_sky, _bricks, _lights, _street)[rng.integers(4)]
    return paint(rng, size)


def add_noise(image: Image.Image, rng: np.random.Generator, deviation: float) -> Image.Image:
    """Sensor noise, mostly grey, of the given standard deviation in grey levels."""
    if deviation <= 0:
        return image
    bank = _noise_bank(round(deviation * 2) / 2)
    left = int(rng.integers(_BANK_SIDE - image.width + 1))
    top = int(rng.integers(_BANK_SIDE - image.height + 1))
    noise = bank.crop((left, top, left + image.width, top + image.height))
    if rng.random() < 0.5:
        noise = noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageChops.add(image, noise, 1, -128)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@functools.cache
def _noise_bank(deviation: float) -> Image.Image:
    """One large noise picture; boards take windows of it, as fresh normals would cost more than the board."""
    rng = np.random.default_rng(0)
    noise = 0.95 * rng.standard_normal((_BANK_SIDE, _BANK_SIDE, 1))
    noise = noise + 0.3 * rng.standard_normal((_BANK_SIDE, _BANK_SIDE, 3))
    for axis in (0, 1):  # neighbouring pixels share noise, as after demosaicing; it also makes smaller files
        noise = 0.6 * noise + 0.2 * (np.roll(noise, 1, axis) + np.roll(noise, -1, axis))
    noise *= deviation / noise.std()
    return Image.fromarray(np.clip(np.rint(128 + noise), 0, 255).astype(np.uint8))


def _luma(color: tuple[float, ...]) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _color(values: np.ndarray) -> Color:
    red, green, blue = np.clip(np.rint(values), 0, 255).astype(int).tolist()
    return red, green, blue


def _shade(color: Color, amount: float) -> Color:
    return _color(np.asarray(color) + amount)


def _bright(rng: np.random.Generator, low: float, high: float) -> Color:
    """A muted colour whose grey level lies between `low` and `high`."""
    tint = rng.uniform(-26, 26, 3)
    return _color(rng.uniform(low, high) + tint - _luma(tuple(tint)))


def _gradient(size: tuple[int, int], first: Color, second: Color, *, horizontal: bool = False) -> Image.Image:
    """Blends from `first` to `second`. Drawn as a strip of 64 px: a gradient has no detail to lose."""
    ramp = np.linspace(0, 1, 64)[:, None]
    strip = np.rint((1 - ramp) * np.asarray(first) + ramp * np.asarray(second)).astype(np.uint8)
    pixels = strip[None, :, :] if horizontal else strip[:, None, :]
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR)


def _sky(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = _gradient(size, _bright(rng, 150, 200), _bright(rng, 180, 225))
    draw = ImageDraw.Draw(image)
    for depth in range(int(rng.integers(2, 5))):
        level = height * (0.4 + 0.15 * depth) + rng.uniform(-20, 20)
        knots = np.linspace(-0.1 * width, 1.1 * width, 7)
        heights = level + rng.uniform(-40, 40, 7)
        ridge = list(zip(knots.tolist(), heights.tolist(), strict=True))
        draw.polygon([*ridge, (1.1 * width, height + 10), (-0.1 * width, height + 10)], fill=_bright(rng, 115, 165))
    return image


def _bricks(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = _gradient(size, _bright(rng, 120, 165), _bright(rng, 120, 165), horizontal=bool(rng.integers(2)))
    draw = ImageDraw.Draw(image)
    mortar, joint = _bright(rng, 165, 195), int(rng.integers(2, 4))
    row, brick = int(rng.integers(18, 34)), int(rng.integers(44, 80))
    for line, y in enumerate(range(int(rng.integers(-row, 0)), height, row)):
        draw.rectangle((0, y, width, y + joint - 1), fill=mortar)
        for x in range(-(line % 2) * brick // 2, width, brick):
            draw.rectangle((x, y, x + joint - 1, y + row), fill=mortar)
    return image


def _lights(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Discs of light out of focus. Drawn at a quarter of the size, blurred, enlarged."""
    small = (size[0] // 4, size[1] // 4)
    image = _gradient(small, _bright(rng, 120, 170), _bright(rng, 120, 170))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(8, 20))):
        x, y, radius = rng.uniform(0, small[0]), rng.uniform(0, small[1]), rng.uniform(4, 20)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_bright(rng, 120, 205))
    return image.filter(ImageFilter.BoxBlur(rng.uniform(1, 3))).resize(size, Image.Resampling.BICUBIC)


def _street(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = _gradient(size, _bright(rng, 165, 220), _bright(rng, 165, 220))
    draw = ImageDraw.Draw(image)
    x = 0
    while x < width:
        house = int(rng.integers(60, 150))
        roof = int(rng.uniform(0.08, 0.5) * height)
        wall = _bright(rng, 120, 170)
        draw.rectangle((x, roof, x + house - 1, height), fill=wall)
        pane = _shade(wall, rng.choice((-14, 30)))
        for top in range(roof + 14, height - 60, 44):
            for left in range(x + 10, x + house - 18, 30):
                draw.rectangle((left, top, left + 13, top + 21), fill=pane)
        x += house
    draw.rectangle((0, height - 36, width, height), fill=_bright(rng, 125, 160))
    return image
