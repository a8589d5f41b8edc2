"""Video files to frames: what containers, rates, rotations and damage there are, and how much memory it takes."""

import io
import struct
import wave
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from models.qwen3_vl import video, video_files
from models.qwen3_vl.video import Video, VideoSettings, encode_video
from models.qwen3_vl.video_files import decode, measure
from tests.models.videos import CODECS, all_frames, clip, write_video


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """20 frames at 10 a second, its index before its frames, as on the web."""
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", clip(20), movflags="faststart")


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_counted_and_found_in_every_container(tmp_path, suffix):
    rate = 25 if suffix == ".ts" else 10
    path = write_video(tmp_path / f"a{suffix}", clip(20, 66, 50), rate=rate)
    assert measure(path) == (20, pytest.approx(rate))
    expected = all_frames(path)
    for found, number in zip(decode(path, [0, 7, 7, 18, 19]), [0, 7, 7, 18, 19], strict=True):
        np.testing.assert_array_equal(np.asarray(found), expected[number])


def test_a_gif_is_a_video(tmp_path):
    pictures = [Image.fromarray(picture) for picture in clip(6)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=200)
    assert measure(tmp_path / "a.gif") == (6, pytest.approx(5.0))
    assert len(list(decode(tmp_path / "a.gif", range(6)))) == 6


def test_a_variable_rate_is_an_average_over_the_time_shown(tmp_path):
    # Shown from 0 to 0.4 s, then once at 3.9 s, the last frame for as long as the encoder's rate says.
    path = write_video(tmp_path / "a.mkv", clip(6), times=(0, 1, 2, 3, 4, 39))
    assert measure(path) == (6, pytest.approx(6 / 4.0, rel=0.02))
    assert len(list(decode(path, range(6)))) == 6


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phones_rotation_is_applied(tmp_path, degrees):
    """As a player shows it: a phone held upright films sideways, and says so in the track's matrix."""
    path = write_video(tmp_path / "a.mp4", clip(4))
    data = bytearray(path.read_bytes())
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = (cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, *matrix)
    (found,) = decode(bytes(data), [2])
    # The matrix turns clockwise, NumPy the other way.
    np.testing.assert_array_equal(np.asarray(found), np.rot90(all_frames(path)[2], -degrees // 90))


def test_a_missing_last_frame_is_the_one_before_it(tmp_path):
    data = write_video(tmp_path / "a.ts", clip(8), rate=25).read_bytes()
    cut = bytearray(data)
    last = max(place for place in range(0, len(data), 188) if data[place + 1] & 0x40)  # where its last frame starts
    cut[last + 30 :] = bytes(len(data) - last - 30)
    frames = list(decode(bytes(cut), range(8)))
    assert len(frames) == 8
    np.testing.assert_array_equal(np.asarray(frames[7]), np.asarray(frames[6]))
    with pytest.raises(ValueError, match="video of .* bytes is damaged: frame 8 can not be decoded"):
        list(decode(data, range(10)))


def test_what_is_cut_short_is_refused(mp4):
    data = mp4.read_bytes()
    for share in (0.5, 0.7, 0.95):
        with pytest.raises(ValueError, match=r"is cut short or damaged after \d+ frames; expected a whole file"):
            measure(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="video of 200 bytes holds no video stream that can be decoded"):
        measure(data[:200])


def test_nothing_that_is_no_whole_video_raises_anything_but_a_line(mp4):
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        data = bytearray(mp4.read_bytes())
        for place in random.integers(0, len(data), 12):
            data[place] = random.integers(0, 256)
        try:
            outcomes.add(len(list(decode(bytes(data), range(measure(bytes(data)).frames)))))
        except ValueError as error:
            assert type(error) is ValueError and "\n" not in str(error)
            assert str(error).startswith("video of ")
            outcomes.add("refused")
    assert {"refused", 20} <= outcomes


def test_what_is_no_video_is_refused(tmp_path, mp4):
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    # A playlist would have FFmpeg open whatever file, or address, it names.
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{mp4}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {mp4}\n".encode()
    for data in (b"", b"text", file.getvalue(), picture.getvalue(), playlist, concat):
        with pytest.raises(ValueError, match="can not be decoded: .*; expected one of mov, matroska, avi"):
            measure(data)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="sound.mp4' holds no video stream that can be decoded"):
        measure(tmp_path / "sound.mp4")
    for name, reason in (("gone.mp4", "No such file"), (".", "Is a directory"), ("a\0b", "null byte")):
        with pytest.raises(ValueError, match=f"can not be read: .*{reason}.*; expected a file or a data URI"):
            measure(Path(name) if name == "." else name)


def test_what_is_too_large_is_refused_before_it_is_decoded(mp4, monkeypatch):
    monkeypatch.setattr(video_files, "MAX_FRAMES", 19)
    with pytest.raises(ValueError, match="has more than 19 frames; expected a part of it"):
        measure(mp4)
    monkeypatch.setattr(video_files, "MAX_FRAME_PIXELS", 64 * 47)
    with pytest.raises(ValueError, match="has frames of 64 x 48 pixels; expected at most 3,008"):
        measure(mp4)
    # Also where the header kept silent about it.
    with pytest.raises(ValueError, match="can not be decoded"):
        list(decode(mp4, [0]))


def test_one_frame_at_a_time_is_held_at_full_size(mp4, monkeypatch):
    alive, most = [], 0

    def watched(source, indices):
        nonlocal most
        for image in decode(source, indices):
            alive.append(weakref.ref(image))
            most = max(most, sum(one() is not None for one in alive))
            yield image

    monkeypatch.setattr(video, "decode", watched)
    settings = VideoSettings(min_pixels=1024, max_pixels=2**20, fps=10)
    assert len(encode_video(Video(source=mp4), settings).images) == 10
    assert len(alive) == 20
    assert most <= 2  # the one before it is let go when the next one has come
