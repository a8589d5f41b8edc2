"""Host side of vision: patches of many images packed into arrays of fixed shape, and M-RoPE positions.

What depends on image grids is computed here, in NumPy, so that one compiled program serves images of every shape.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.policy import PolicyConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One image as patches: what transformers' image processor calls `pixel_values` and `image_grid_thw`."""

    patches: Float[np.ndarray, "patches patch_dim"]
    """Merge-block order: the patches that one feature joins stand next to each other."""
    grid: Grid
    """Frames, rows and columns of patches."""

    def __post_init__(self) -> None:
        if len(self.patches) != self.grid[0] * self.grid[1] * self.grid[2]:
            raise ValueError(f"an image of grid {self.grid} came with {len(self.patches)} patches")

    def tokens(self, config: PolicyConfig) -> int:
        """Placeholder tokens that the image takes in the text."""
        return len(self.patches) // merge_side(config) ** 2


def merge_side(config: PolicyConfig) -> int:
    """Patches on a side of the blocks that features join; 1 where there are none."""
    return 1 if config.vision is None else config.vision.spatial_merge_size


class PackedImages(NamedTuple):
    """The images of each row of tokens, one after the other, padded to the same number of patches."""

    patches: Float[Array, "rows patches patch_dim"]
    segment_ids: Int[Array, "rows patches"]
    """0 is padding; patches attend within their segment, one segment a frame."""
    coordinates: Int[Array, "rows patches 2"]
    """Row and column of the patch in its image, for the 2-D rotary embedding."""
    corners: Int[Array, "rows patches 4"]
    """The four entries of the learned position table that surround the patch."""
    weights: Float[Array, "rows patches 4"]
    """Their bilinear weights."""
    feature_index: Int[Array, "rows tokens"]
    """Which merged feature of the row replaces the token's embedding; -1 for text."""


def pack_images(
    config: PolicyConfig,
    rows: Sequence[Sequence[EncodedImage]],
    feature_index: Int[np.ndarray, "rows tokens"],
    patches: int,
    *,
    dtype: DTypeLike = np.float32,
) -> PackedImages:
    """The images of each row in arrays of `patches` patches; features are numbered through the row.

    `dtype` is the patches': a model that computes in bfloat16 reads nothing finer, and they take half the memory.
    Raises ValueError where a row's images do not fit, and where `patches` would split a merge block.
    """
    vision = config.vision
    if vision is None:
        raise ValueError("images are to be packed for a model that reads text only; expected rows without")
    if patches % vision.spatial_merge_size**2:
        raise ValueError(f"room for {patches} patches a row is not a multiple of {vision.spatial_merge_size**2}")
    if len(rows) != len(feature_index):
        raise ValueError(f"images of {len(rows)} rows came with feature indices of {len(feature_index)} rows")
    empty: dict[str, Any] = dict(  # NumPy arrays, which programs take as they take JAX's
        patches=np.zeros((len(rows), patches, vision.patch_dim), dtype),
        segment_ids=np.zeros((len(rows), patches), np.int32),
        coordinates=np.zeros((len(rows), patches, 2), np.int32),
        corners=np.zeros((len(rows), patches, 4), np.int32),
        weights=np.zeros((len(rows), patches, 4), np.float32),
        feature_index=np.asarray(feature_index, np.int32),
    )
    packed = PackedImages(**empty)
    for row, images in enumerate(rows):
        needed = sum(len(image.patches) for image in images)
        if needed > patches:
            raise ValueError(f"row {row} holds images of {needed} patches; there is room for {patches}")
        at, segment = 0, 1
        for image in images:
            packed.patches[row, at : at + len(image.patches)] = image.patches
            geometry = _frame_geometry(image.grid[1], image.grid[2], vision.spatial_merge_size, vision.position_side)
            for _ in range(image.grid[0]):
                span = np.s_[row, at : at + image.grid[1] * image.grid[2]]
                packed.segment_ids[span] = segment
                packed.coordinates[span], packed.corners[span], packed.weights[span] = geometry
                at, segment = at + image.grid[1] * image.grid[2], segment + 1
    return packed


def feature_indices(token_ids: Int[np.ndarray, " tokens"], *placeholder_ids: int) -> Int[np.ndarray, " tokens"]:
    """The k-th placeholder of a row takes the row's feature k; -1 for text."""
    is_placeholder = np.isin(np.asarray(token_ids), placeholder_ids)
    return np.where(is_placeholder, np.cumsum(is_placeholder) - 1, -1).astype(np.int32)


def placeholder_ids(config: PolicyConfig) -> tuple[int, int]:
    """The tokens in whose places features stand, of images and of videos."""
    return config.image_token_id, config.video_token_id


def mrope_positions(
    token_ids: Int[np.ndarray, " tokens"], grids: Sequence[Grid], config: PolicyConfig, start: int = 0
) -> tuple[Int[np.ndarray, "tokens 3"], int]:
    """M-RoPE positions (time, row, column) of each token, and the position of the token that would come next.

    Text counts up on all three axes; an image counts up by row and column from where it begins, and what follows it
    goes on from one more than its largest position. `start` is the first token's position (appended turns).
    A video is given as its frames, each a grid of its own, as the text puts a time mark before each of them.
    Raises ValueError where the placeholder tokens and the grids do not match.
    """
    merge = merge_side(config)
    token_ids = np.asarray(token_ids)
    placeholders = np.flatnonzero(np.isin(token_ids, placeholder_ids(config)))
    sizes = [frames * (height // merge) * (width // merge) for frames, height, width in grids]
    if sum(sizes) != len(placeholders):
        raise ValueError(f"the text holds {len(placeholders)} image tokens; its {len(grids)} images need {sum(sizes)}")
    positions = np.empty((len(token_ids), 3), np.int32)
    at, position = 0, start
    ends = list(itertools.accumulate(sizes))
    for grid, size, end in zip(grids, sizes, ends, strict=True):
        begin = int(placeholders[end - size])
        if placeholders[end - 1] != begin + size - 1:
            raise ValueError(f"the {size} tokens of the image of grid {grid} are interrupted by text at {begin}")
        positions[at:begin] = np.arange(position, position + begin - at)[:, None]
        position += begin - at
        at = begin + size
        positions[begin:at] = _feature_positions(grid, merge) + position
        position += max(grid[1], grid[2]) // merge
    positions[at:] = np.arange(position, position + len(token_ids) - at)[:, None]
    return positions, position + len(token_ids) - at


@functools.lru_cache(maxsize=4096)
def _feature_positions(grid: Grid, merge: int) -> Int[np.ndarray, "features 3"]:
    """(frame, row, column) of each merged feature of an image."""
    shape = (grid[0], grid[1] // merge, grid[2] // merge)
    return np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=-1).astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _frame_geometry(
    height: int, width: int, merge: int, side: int
) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, "n 4"], Float[np.ndarray, "n 4"]]:
    """Coordinates of a frame's patches in merge-block order, the table entries around each, and their weights."""
    if height % merge or width % merge:
        raise ValueError(f"an image of {height} x {width} patches can not be merged in blocks of {merge} x {merge}")
    rows, columns = np.divmod(np.arange(height * width), width)
    blocks = (height // merge, merge, width // merge, merge)
    coordinates = np.stack([axis.reshape(blocks).swapaxes(1, 2).ravel() for axis in (rows, columns)], axis=-1)
    row_taps, row_weights = _linear_taps(coordinates[:, 0], height, side)
    column_taps, column_weights = _linear_taps(coordinates[:, 1], width, side)
    corners = (row_taps[:, :, None] * side + column_taps[:, None, :]).reshape(-1, 4)
    weights = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)
    return coordinates.astype(np.int32), corners.astype(np.int32), weights


def _linear_taps(
    index: Int[np.ndarray, " n"], size: int, side: int
) -> tuple[Int[np.ndarray, "n 2"], Float[np.ndarray, "n 2"]]:
    """Two table entries on one axis and their weights; the ends of the image fall on the ends of the table.

    fp32 throughout: in float64 a patch that falls on a table entry may take the entry below it, with weight 1 - ulp.
    """
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    below = np.floor(source)
    taps = np.minimum(below.astype(np.int32)[:, None] + np.arange(2), side - 1)
    share = source - below
    return taps, np.stack([1 - share, share], axis=-1)
