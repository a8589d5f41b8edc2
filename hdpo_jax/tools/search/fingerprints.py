"""Perceptual hashes: numbers that are alike where images look alike.

A fingerprint says of the 128 slowest waves in an image's brightness (its discrete cosine transform) which are stronger
than the median. Recompression, scaling and stretching hardly touch those; cutting a margin off shifts all of them, so
the index keeps a fingerprint of the whole image and of fourteen parts of it: what is left when margins are
cut off.

Own code rather than the imagehash package: it is a matrix product, and that package brings SciPy and PyWavelets along.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt64
from PIL import Image

BITS = 128
WORDS = BITS // 64
SIDE = 48
"""Pixels that an image is brought to."""
WAVES = 16
"""Waves along each side, among which the slowest are taken."""
NEAR = 26
"""Bits in which fingerprints of one image differ at most: a fifth. Other images differ in a quarter or more."""
FLAT = 2.0
"""Standard deviation of brightness (of 255) below which an image shows nothing that a fingerprint could hold."""

Cut = tuple[float, float, float, float]
WHOLE: Cut = (0.0, 0.0, 0.0, 0.0)
CUTS: Sequence[Cut] = (
    WHOLE,
    (0.04, 0.04, 0.04, 0.04),
    (0.08, 0.08, 0.08, 0.08),
    (0.05, 0.0, 0.0, 0.0),
    (0.0, 0.05, 0.0, 0.0),
    (0.0, 0.0, 0.05, 0.0),
    (0.0, 0.0, 0.0, 0.05),
    (0.1, 0.0, 0.0, 0.0),
    (0.0, 0.1, 0.0, 0.0),
    (0.0, 0.0, 0.1, 0.0),
    (0.0, 0.0, 0.0, 0.1),
    (0.05, 0.05, 0.0, 0.0),
    (0.0, 0.05, 0.05, 0.0),
    (0.0, 0.0, 0.05, 0.05),
    (0.05, 0.0, 0.0, 0.05),
)
"""Shares cut off at the left, top, right and bottom."""


def fingerprints(image: Image.Image, cuts: Sequence[Cut] = CUTS) -> UInt64[np.ndarray, "cuts words"] | None:
    """A fingerprint for each cut; None where the image is all of one brightness."""
    grey = image.convert("L")
    # Once down to what the cuts need: each of them then costs as little, however large the image is.
    grey.thumbnail((4 * SIDE, 4 * SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if np.asarray(grey, np.float32).std() < FLAT:
        return None
    width, height = grey.size
    rows = []
    for left, top, right, bottom in cuts:
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        pixels = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        rows.append(_bits(np.asarray(pixels, np.float32)))
    return np.packbits(np.stack(rows), axis=1).view("<u8")


def distances(
    kept: UInt64[np.ndarray, "images cuts words"], looked_up: UInt64[np.ndarray, " words"]
) -> Int[np.ndarray, " images"]:
    """Bits in which the nearest of each image's fingerprints differs from one."""
    if not len(kept):
        return np.zeros(0, np.int64)
    # In parts: the differences of a million images at once would take 200 MB.
    parts = np.array_split(kept, -(-len(kept) // 65_536))
    return np.concatenate([np.bitwise_count(part ^ looked_up).sum(-1, dtype=np.int64).min(1) for part in parts])


def _bits(pixels: Float[np.ndarray, "side side"]) -> np.ndarray:
    basis, (rows, columns) = _cosines(), _slowest()
    waves = (basis @ pixels @ basis.T)[rows, columns]
    return waves > np.median(waves)


@functools.cache
def _cosines() -> Float[np.ndarray, "waves side"]:
    """cos(pi (2 i + 1) k / (2 n)) for wave k at pixel i of n."""
    pixel, wave = np.arange(SIDE), np.arange(WAVES)[:, None]
    return np.cos(np.pi * (2 * pixel + 1) * wave / (2 * SIDE)).astype(np.float32)


@functools.cache
def _slowest() -> tuple[np.ndarray, np.ndarray]:
    """Which waves count; the constant one, an image's brightness, does not."""
    waves = [(row, column) for row in range(WAVES) for column in range(WAVES) if row + column > 0]
    chosen = sorted(waves, key=lambda wave: (wave[0] ** 2 + wave[1] ** 2, wave))[:BITS]
    rows, columns = np.array(chosen).T
    return rows, columns
