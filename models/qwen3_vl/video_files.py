"""Video files to upright frames, decoded one after the other: only those that are asked for are ever kept."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import av
import av.error
from PIL import Image

from models.qwen3_vl.sources import Source, named, open_file

FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
"""FFmpeg's names of the containers that are read. Others are refused: a playlist makes FFmpeg open what it names."""

MAX_FRAMES = 2**18
"""Frames that are decoded at most: 2.4 hours at 30 a second."""
MAX_FRAME_PIXELS = 2**25
"""A larger frame is refused before it is decoded (8K has 33.2 million pixels): decoders hold up to 16 of them."""
THREADS = 4
"""A decoder holds a frame a thread."""
UNKNOWN_RATE = 24.0
"""Frames a second where nothing says how many: as transformers assumes."""

_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
"""Degrees counter-clockwise by which a player turns a frame, and what does it."""


class Footage(NamedTuple):
    """What there is to sample from."""

    frames: int
    rate: float
    """Frames a second on average, over the time that they are shown."""


def measure(source: Source) -> Footage:
    """Counts the frames of a file without decoding them; headers may lack the count, or be wrong.

    Raises ValueError, one line, for what is no video, is cut short or is too large.
    """
    name = named(source, "video")
    with _opened(source) as (container, stream):
        context = stream.codec_context
        if context.width * context.height > MAX_FRAME_PIXELS:
            size = f"{context.width} x {context.height}"
            raise ValueError(f"{name} has frames of {size} pixels; expected at most {MAX_FRAME_PIXELS:,}")
        frames, begin, end, last = 0, None, None, None
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:  # the end of the stream, or cut away by an edit list
                continue
            if packet.is_corrupt:
                raise ValueError(f"{name} is cut short or damaged after {frames} frames; expected a whole file")
            frames += 1
            if frames > MAX_FRAMES:
                raise ValueError(f"{name} has more than {MAX_FRAMES:,} frames; expected a part of it")
            if packet.pts is not None:
                begin = packet.pts if begin is None else min(begin, packet.pts)
                if end is None or packet.pts >= end:
                    end, last = packet.pts, packet.duration
        if not frames:
            raise ValueError(f"{name} holds no frames")
        if begin is not None and last:
            return Footage(frames, float(frames / ((end + last - begin) * stream.time_base)))
        return Footage(frames, float(stream.average_rate or stream.guessed_rate or UNKNOWN_RATE))


def decode(source: Source, indices: Sequence[int]) -> Iterator[Image.Image]:
    """The frames of these indices, which never fall, in RGB and upright; an index that repeats repeats its frame.

    Raises ValueError, one line, where a frame can not be decoded.
    """
    name, at = named(source, "video"), 0
    with _opened(source) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = THREADS
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # frames may grow on the way
        frame = None
        for number, frame in enumerate(container.decode(stream)):
            if number < indices[at]:
                continue
            image = _upright(frame)
            while at < len(indices) and indices[at] == number:
                yield image
                at += 1
            if at == len(indices):
                return
        # Some streams announce a frame more than they show (packed B-frames, an end that was cut).
        if frame is None or indices[at] < indices[-1]:
            raise ValueError(f"{name} is damaged: frame {indices[at]} can not be decoded")
        yield from [_upright(frame)] * (len(indices) - at)


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    turn = _UPRIGHT.get(frame.rotation)
    return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. Whatever FFmpeg says against them becomes one line."""
    name = named(source, "video")
    try:
        # An open file, not its name, which FFmpeg might take for an address.
        with (
            open_file(source, "video") as file,
            av.open(file, options={"format_whitelist": FORMATS}, metadata_errors="ignore") as container,
        ):
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise ValueError(f"{name} holds no video stream that can be decoded ({container.format.name})")
            yield container, stream
    except av.error.FFmpegError as error:
        known = FORMATS.replace(",", ", ")
        raise ValueError(f"{name} can not be decoded: {error.strerror}; expected one of {known}") from error
