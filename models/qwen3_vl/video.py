"""Videos to patches and times: the numbers of transformers' Qwen3-VL video processor, without torch.

To the model a video is a row of images, one for every `temporal_patch_size` sampled frames, each behind the time at
which it is shown. What is sampled and how it is resized is said by a video_preprocessor_config.json.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from models.qwen3_vl.images import EncodedImage
from models.qwen3_vl.pixels import WIDEST, PatchSettings, cut_patches, load_image, opaque
from models.qwen3_vl.sources import Source, named, read_file
from models.qwen3_vl.video_files import UNKNOWN_RATE, Footage, decode, measure


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video as a message or a row of data gives it."""

    source: Source | tuple[Source | Image.Image, ...]
    """A file, or all its frames as image files."""
    fps: float | None = None
    """Frames to sample a second (by default what the settings say); of given frames, how many there are a second."""
    num_frames: int | None = None
    """Frames to sample from a file, in place of `fps`."""

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"a video's fps is {self.fps}; expected a positive number")
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("a video has fps and num_frames; expected one of them")
        if self.num_frames is not None and isinstance(self.source, tuple):
            raise ValueError("num_frames beside the frames of a video, which are taken as they are; expected fps")

    @classmethod
    def from_part(cls, part: Mapping[str, Any]) -> "Video":
        """Of a message part `{"type": "video", "video": …}`. Raises ValueError for another shape of it."""
        unknown = sorted(part.keys() - {"type", "video", "fps", "num_frames"})
        if unknown:
            raise ValueError(f"a video part has {', '.join(unknown)}; expected video, and fps or num_frames")
        source = part.get("video")
        if isinstance(source, list | tuple) and all(isinstance(frame, Source | Image.Image) for frame in source):
            source = tuple(source)
        elif not isinstance(source, Source):
            found = str(source)[:60]
            raise ValueError(f"a video part carries {found!r}; expected a path, a data URI or a list of frame images")
        fps, num_frames = part.get("fps"), part.get("num_frames")
        if not isinstance(fps, int | float | None) or not isinstance(num_frames, int | None):
            raise ValueError(f"a video part has fps {fps!r}, num_frames {num_frames!r}; expected numbers, or none")
        return cls(source=source, fps=fps, num_frames=num_frames)

    @property
    def name(self) -> str:
        """As errors name it."""
        return f"video of {len(self.source)} frames" if isinstance(self.source, tuple) else named(self.source, "video")

    @property
    def nbytes(self) -> int:
        """Host memory that its files take."""
        files = self.source if isinstance(self.source, tuple) else (self.source,)
        return sum(len(file) for file in files if isinstance(file, str | bytes))


@dataclass(frozen=True, kw_only=True)
class EncodedVideo:
    """What transformers' processor calls `pixel_values_videos` and `video_grid_thw`, cut by time, with the times."""

    images: tuple[EncodedImage, ...]
    """One for each temporal patch."""
    seconds: tuple[float, ...]
    """When each is shown: halfway between the first and the last frame in it."""


@dataclass(frozen=True, kw_only=True)
class VideoSettings(PatchSettings):
    """What a video_preprocessor_config.json says. Defaults are those of transformers' Qwen3-VL processor."""

    min_pixels: int = 128 * 32 * 32
    """Of all sampled frames together."""
    max_pixels: int = 768 * 32 * 32
    patch_size: int = 16
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fps: float = 2
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    """No frame takes more than `max_video_tokens`, however few there are."""
    max_video_tokens: int = 768

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"videos of {self.min_pixels} to {self.max_pixels} pixels; expected 0 < least <= most")
        if not 0 < self.min_frames <= self.max_frames:
            raise ValueError(f"videos of {self.min_frames} to {self.max_frames} frames; expected 0 < least <= most")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"videos sampled at {self.fps} frames a second; expected a positive number")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "VideoSettings":
        """From a parsed video_preprocessor_config.json."""
        if raw.get("do_sample_frames", True) is False or raw.get("num_frames") is not None:
            raise ValueError("the video settings turn do_sample_frames off, or name num_frames; expected fps alone")
        found = cls.named_in(raw, "video")
        size = raw.get("size") or {}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if size.get(edge) is not None:
                found[name] = size[edge]
        own = ("fps", "min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens")
        return cls(**found, **{name: raw[name] for name in own if raw.get(name) is not None})

    def sampled(self, footage: Footage, video: Video) -> Int[np.ndarray, " frames"]:
        """Which frames are shown: evenly spread from the first to the last, `fps` a second, within the limits."""
        if video.num_frames is not None:
            count = video.num_frames
            if not 0 < count <= self.max_frames:
                raise ValueError(f"{video.name} has num_frames {count}; expected 1 to {self.max_frames} (max_frames)")
        else:
            asked = footage.frames / footage.rate * (self.fps if video.fps is None else video.fps)
            count = int(min(max(asked, self.min_frames), self.max_frames, footage.frames))
        return np.linspace(0, footage.frames - 1, count).round().astype(int)

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that each frame is brought to: whole merge blocks, all within the allowed volume.

        Raises ValueError for frames more than 200 times as long as wide.
        """
        temporal, block = self.temporal_patch_size, self.block
        if min(height, width) < block:
            scale = max(block / height, block / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > WIDEST * min(height, width):
            raise ValueError(f"video of {width} x {height} pixels; expected sides of at most {WIDEST} to 1")
        rows, columns = round(height / block), round(width / block)
        volume = round(frames / temporal) * temporal * rows * columns * block**2
        if volume > (most := self._most_pixels(frames)):
            shrink = math.sqrt(frames * height * width / most)
            rows, columns = (max(1, math.floor(side / shrink / block)) for side in (height, width))
        elif volume < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (frames * height * width))
            rows, columns = (math.ceil(side * grow / block) for side in (height, width))
        return rows * block, columns * block

    def _most_pixels(self, frames: int) -> int:
        if not self.cap_pixels_per_frame:
            return self.max_pixels
        most = min(self.max_video_tokens * self.block**2, self.max_pixels // frames)
        return frames * max(most, int(self.min_pixels * 1.05))


def encode_video(video: Video, settings: VideoSettings) -> EncodedVideo:
    """Sampled, resized, normalised and cut into patches; the last frame is repeated to fill a temporal patch.

    One frame at a time is held at full size. Raises ValueError, one line, that names the video.
    """
    source = video.source
    if isinstance(source, tuple):
        rate = UNKNOWN_RATE if video.fps is None else video.fps
        indices, frames = np.arange(len(source)), _given_frames(source)
    else:
        if isinstance(source, str) and source.startswith("data:"):
            source = read_file(source, "video")  # once, not for each pass
        footage = measure(source)
        indices, rate = settings.sampled(footage, video), footage.rate
        frames = decode(source, indices.tolist())
    temporal = settings.temporal_patch_size
    if len(indices) < temporal:
        raise ValueError(f"{video.name}: {len(indices)} frames; expected at least {temporal} (an image is one)")
    images = tuple(_patches(frames, len(indices), settings))
    return EncodedVideo(images=images, seconds=tuple(_seconds(indices, rate, temporal)))


def _patches(frames: Iterable[Image.Image], count: int, settings: VideoSettings) -> Iterator[EncodedImage]:
    """Each temporal patch as it is filled."""
    resized, temporal = _resized(frames, count, settings), settings.temporal_patch_size
    while held := list(islice(resized, temporal)):
        yield cut_patches(np.stack(held + held[-1:] * (temporal - len(held))), settings)


def _resized(frames: Iterable[Image.Image], count: int, settings: VideoSettings) -> Iterator[np.ndarray]:
    """8-bit RGB, all of the size that the first frame is brought to."""
    size = None
    for frame in frames:
        height, width = size = size or settings.resized(count, frame.height, frame.width)
        yield np.asarray(frame.resize((width, height), settings.resample))


def _given_frames(sources: Sequence[Source | Image.Image]) -> Iterator[Image.Image]:
    size = None
    for number, source in enumerate(sources):
        frame = opaque(source).convert("RGB") if isinstance(source, Image.Image) else load_image(source)
        size = size or frame.size
        if frame.size != size:
            found, first = (f"{width} x {height}" for width, height in (frame.size, size))
            raise ValueError(f"frame {number} of a video has {found} pixels; expected {first}, as the first has")
        yield frame


def _seconds(indices: Int[np.ndarray, " frames"], rate: float, temporal: int) -> Iterator[float]:
    shown = [index / rate for index in indices.tolist()]
    shown += shown[-1:] * (-len(shown) % temporal)
    for first in range(0, len(shown), temporal):
        yield (shown[first] + shown[first + temporal - 1]) / 2
