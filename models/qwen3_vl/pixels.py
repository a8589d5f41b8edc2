"""Image files to patches: the numbers of transformers' Qwen2-VL image processor, without its overhead."""

import functools
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from models.qwen3_vl.images import EncodedImage
from models.qwen3_vl.sources import Source, named, read_file

MAX_PIXELS = 89_478_485
"""A larger image is refused before it is decoded (Pillow warns from this size on: 256 MiB of RGB)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What image files may be. Others are refused: some of Pillow's readers start programs (EPS)."""

WIDEST = 200
"""Longest over shortest side that the model was made for."""


@dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """How pixels become patches; what the settings of images and of videos have in common."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @staticmethod
    def named_in(raw: Mapping[str, Any], what: str) -> dict[str, Any]:
        """These settings, as far as a parsed processor config names them; `what` is image or video."""
        for step in ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"):
            if raw.get(step, True) is False:
                raise ValueError(f"the {what} settings turn {step} off; only {what}s with every step are supported")
        names = ("patch_size", "temporal_patch_size", "merge_size", "rescale_factor", "resample")
        found = {name: raw[name] for name in names if raw.get(name) is not None}
        return found | {name: tuple(raw[f"image_{name}"]) for name in ("mean", "std") if raw.get(f"image_{name}")}

    @property
    def block(self) -> int:
        """Pixels on a side of what becomes one feature."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True)
class ImageSettings(PatchSettings):
    """What a preprocessor_config.json says. Defaults are those of transformers' Qwen2-VL processor."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"images of {self.min_pixels} to {self.max_pixels} pixels; expected 0 < least <= most")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ImageSettings":
        """From a parsed preprocessor_config.json; areas are `size`'s edges (in pixels) or min_pixels, max_pixels."""
        found = cls.named_in(raw, "image")
        size = raw.get("size") or {}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = raw.get(name) if raw.get(name) is not None else size.get(edge)
            if value is not None:
                found[name] = value
        return cls(**found)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is brought to: whole merge blocks, the allowed area, nearly the same shape.

        Raises ValueError for an image more than 200 times as long as wide.
        """
        if max(height, width) > WIDEST * min(height, width):
            raise ValueError(f"image of {width} x {height} pixels; expected sides of at most {WIDEST} to 1")
        block = self.block
        rows, columns = round(height / block), round(width / block)
        if rows * columns * block**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = math.floor(height / shrink / block), math.floor(width / shrink / block)
        elif rows * columns * block**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / block), math.ceil(width * grow / block)
        return max(rows, 1) * block, max(columns, 1) * block


def encode_image(image: Image.Image, settings: ImageSettings) -> EncodedImage:
    """Resized, normalised and cut into patches, the `temporal_patch_size` frames of a still image all alike."""
    height, width = settings.resized(image.height, image.width)
    pixels = np.asarray(opaque(image).resize((width, height), settings.resample))
    return cut_patches(pixels.reshape(1, height, width, -1), settings)


def cut_patches(frames: UInt8[np.ndarray, "frames height width channels"], settings: PatchSettings) -> EncodedImage:
    """The frames of one temporal patch, normalised and cut; a single one stands for all of them.

    Height and width are whole merge blocks; one channel stands for three.
    """
    patch, merge = settings.patch_size, settings.merge_size
    count, height, width, channels = frames.shape
    rows, columns = height // patch, width // patch
    blocks = frames.reshape(count, rows // merge, merge, patch, columns // merge, merge, patch, channels)
    blocks = blocks.transpose(7, 1, 4, 2, 5, 0, 3, 6)
    shape = (*blocks.shape[1:5], 3, settings.temporal_patch_size, patch, patch)
    patches = np.empty(shape, np.float32)
    for channel, table in enumerate(_normalised_levels(settings)):
        patches[:, :, :, :, channel] = table[blocks[channel % channels]]
    return EncodedImage(patches=patches.reshape(rows * columns, -1), grid=(1, rows, columns))


def opaque(image: Image.Image) -> Image.Image:
    """In RGB, what is transparent on white; grey stays grey, as its three channels would be resized alike."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _normalised_levels(settings: PatchSettings) -> Float[np.ndarray, "channels 256"]:
    """What each 8-bit level becomes, rounded where transformers rounds: after scaling, and at every later step."""
    levels = (np.arange(256) * settings.rescale_factor).astype(np.float32)
    mean, std = np.array(settings.mean, np.float32), np.array(settings.std, np.float32)
    return (levels - mean[:, None]) / std[:, None]


def load_image(source: Source) -> Image.Image:
    """Decodes a file's bytes, a path or a base64 data URI to upright RGB, as transformers' `load_image` does.

    EXIF orientation is applied; an alpha channel is dropped. Raises ValueError, one line, for what is not of `FORMATS`
    or can not be decoded, and for images of more than `MAX_PIXELS`.
    """
    name = named(source, "image")
    try:
        with Image.open(io.BytesIO(read_file(source, "image")), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{name} has {image.width} x {image.height} pixels; expected at most {MAX_PIXELS:,}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except ValueError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; expected at most {MAX_PIXELS:,}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} can not be decoded: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error…
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} can not be decoded: {reason}") from error
