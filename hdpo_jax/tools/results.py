"""What tools give back, made an observation: text and images of bounded size, errors in words."""

import io
from collections.abc import Iterable

from PIL import Image, UnidentifiedImageError

from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools.kernel.pictures import MAX_PIXELS, opened, rgb
from hdpo_jax.types import Observation

NO_OUTPUT = "(no output)"
LONGEST_ERROR = 500
"""Characters of what was raised that the policy gets to see."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of images that come as files: Pillow's readers of some others start programs."""
LARGEST_SOURCE = 1 << 26
"""Pixels of an image before it is reduced; a larger one is left out undecoded."""


def observation(parts: Iterable[str | bytes | Image.Image], config: ToolsConfig, *, ok: bool = True) -> Observation:
    """Texts joined by lines, and images in their order; what is over the bounds is cut, and the text says so.

    Bytes are an image file, of whatever origin.
    """
    texts: list[str] = []
    notes: list[str] = []
    images: list[Image.Image] = []
    dropped = 0
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif len(images) + len(notes) == config.max_images:
            dropped += 1
        else:
            try:
                images.append(_reduced(decoded_image(part) if isinstance(part, bytes) else part))
            except ValueError as error:
                notes.append(f"[image left out: {error}]")
    if dropped:
        notes.append(f"[{dropped} more images are left out: one call returns {config.max_images} at most.]")
    said = bounded_text("\n".join(filter(None, texts)), config.output_chars)
    text = "\n".join(filter(None, [said, *notes]))
    return Observation(text=text if text or images else NO_OUTPUT, images=images, ok=ok)


def encodable(text: str) -> str:
    """The text with `?` for each lone surrogate, which no encoding holds."""
    return text.encode("utf-8", "replace").decode()


def bounded_text(text: str, limit: int) -> str:
    """The text, or its head and tail around a mark that says how much was cut. Lone surrogates become `?`."""
    text = encodable(text)
    if len(text) <= limit:
        return text
    half = max(limit // 2, 1)
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters cut …]\n{text[-half:]}"


def decoded_image(data: bytes) -> Image.Image:
    """An image file of unknown origin, upright, RGB. Raises ValueError, in words, for what is none or is too large."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image)
        image = opened(data)
        image.load()  # now, where its errors are told in words
        return image
    except UnidentifiedImageError:
        raise ValueError(f"expected a file of type {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has too many pixels; expected at most {LARGEST_SOURCE:,}") from None
    except ValueError:
        raise
    except Exception as error:  # Decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error…
        raise ValueError(f"it can not be decoded: {error_in_words(error)}") from error


def error_in_words(error: BaseException) -> str:
    """What an error says, as text that can be tokenized, whatever was raised."""
    try:
        said = str(error)
    except Exception:
        said = "it does not say why"
    return encodable(f"{type(error).__name__}: {said}")[:LONGEST_ERROR]


def _reduced(image: Image.Image) -> Image.Image:
    """A copy in RGB, of at most MAX_PIXELS."""
    _check_size(image)
    image = rgb(image)
    pixels = image.width * image.height
    if pixels <= MAX_PIXELS:
        return image.copy()
    scale = (MAX_PIXELS / pixels) ** 0.5
    # A side can not be less than 1, so the other one has to be bounded by itself.
    width = min(max(1, int(image.width * scale)), MAX_PIXELS)
    height = min(max(1, int(image.height * scale)), MAX_PIXELS // width)
    return image.resize((width, height), reducing_gap=2.0)


def _check_size(image: Image.Image) -> None:
    if not 0 < image.width * image.height <= LARGEST_SOURCE:
        raise ValueError(f"it has {image.width} x {image.height} pixels; expected at most {LARGEST_SOURCE:,}")
