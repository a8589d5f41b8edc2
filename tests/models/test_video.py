"""Videos as the model sees them, against transformers' processor: ids, grids, positions, patches; and odd videos."""

import base64
import json
import pickle
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.video_utils import VideoMetadata

from models.qwen3_vl.images import mrope_positions
from models.qwen3_vl.processing import Processor
from models.qwen3_vl.video import Video, VideoSettings, encode_video
from models.qwen3_vl.video_files import Footage
from tests.models.hf_directory import IMAGES, write_hf_directory
from tests.models.videos import all_frames, clip, hf_processor, video_module, video_processor_class, write_video

SETTINGS = {**IMAGES, "video_processor_type": "Qwen3VLVideoProcessor", "fps": 3, "max_frames": 9}
LEVEL = 1 / 127.5
"""One of the 256 levels, normalised. Pillow's resize and torch's round some pixels apart, a few in both passes."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = write_hf_directory(tmp_path_factory.mktemp("model"))
    (directory / "video_preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return directory


@pytest.fixture(scope="module")
def processor(directory):
    return Processor.from_hf(directory)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """21 frames at 10 a second, 2.1 s; and 3 at 24, of another shape."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / "long.mp4", clip(21, 50, 38)),
        write_video(folder / "short.webm", clip(3, 96, 36), rate=24),
    ]


def part(kind: str, shown: Any) -> dict[str, Any]:
    return {"type": kind, kind: shown}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def conversation(images, videos):
    """Images and videos in turn."""
    asked = [part("video", videos[0]), said("<0.3 seconds> What?"), part("image", images[0]), part("video", videos[1])]
    return [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "A sign."},
        {"role": "user", "content": [said("And "), part("image", images[1]), part("video", videos[0]), said("?")]},
    ]


def test_a_conversation_with_videos_is_what_transformers_processor_makes(directory, processor, videos, monkeypatch):
    pictures = [Image.fromarray(clip(1, 60, 40, seed=1)[0]), Image.fromarray(clip(1, 20, 70, seed=2)[0])]
    found = processor.encode_messages(conversation(pictures, list(map(str, videos))))

    oracle = hf_processor(directory, processor, monkeypatch)
    text = oracle.apply_chat_template(conversation(pictures, videos), add_generation_prompt=True)
    metadata = [VideoMetadata(total_num_frames=21, fps=10.0), VideoMetadata(total_num_frames=3, fps=24.0)]
    shown = [0, 1, 0]
    decoded = [all_frames(video) for video in videos]
    expected = oracle(
        text=[text],
        images=pictures,
        videos=[decoded[video] for video in shown],
        video_metadata=[VideoMetadata(**dict(metadata[video])) for video in shown],
        return_tensors="pt",
    )
    np.testing.assert_array_equal(found.token_ids, expected["input_ids"][0])

    # What is sampled: 6 frames of 2.1 s at 3 a second, and all 3 of the short one, whose last is repeated. A sampler
    # that stepped by 10 / 3 frames would take 7 of the first.
    image_id, video_id = processor.config.image_token_id, processor.config.video_token_id
    assert expected["video_grid_thw"][:, 0].tolist() == [3, 2, 3]
    grids = [tuple(grid) for grid in expected["video_grid_thw"].tolist()]
    frames = [(1, rows, columns) for count, rows, columns in grids for _ in range(count)]
    images = [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
    assert [image.grid for image in found.images] == [*frames[:3], images[0], *frames[3:5], images[1], *frames[5:]]

    patches = [image.patches for image in found.images]
    of_videos = np.concatenate(patches[:3] + patches[4:6] + patches[7:])
    difference = np.abs(of_videos - expected["pixel_values_videos"].numpy())
    assert difference.max() < 2 * LEVEL + 1e-5
    assert (difference > LEVEL / 2).mean() < 0.1
    assert (difference > LEVEL * 1.5).mean() < 1e-3
    np.testing.assert_allclose(np.concatenate([patches[3], patches[6]]), expected["pixel_values"], atol=1e-6)

    with torch.device("meta"):
        model = transformers.Qwen3VLModel(transformers.Qwen3VLConfig.from_pretrained(directory))
    given = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    positions, delta = model.get_rope_index(**{name: expected[name] for name in given})
    ours, following = mrope_positions(found.token_ids, [image.grid for image in found.images], processor.config)
    np.testing.assert_array_equal(ours.T, positions[:, 0])
    assert following == len(ours) + int(delta)
    assert {image_id, video_id} <= set(found.token_ids.tolist())


def test_a_later_turn_is_what_the_whole_conversation_says_of_it(processor, videos):
    pictures = [Image.fromarray(clip(1, 60, 40)[0])] * 2
    messages = conversation(pictures, list(map(str, videos)))
    whole = processor.encode_messages(messages)
    turn = processor.user_turn(messages[3], pictures[1:], [Video(source=str(videos[0]))])
    np.testing.assert_array_equal(turn.token_ids, whole.token_ids[-len(turn.token_ids) :])
    assert [image.grid for image in turn.images] == [image.grid for image in whole.images[-4:]]


def test_rules_are_those_of_transformers():
    oracle = video_processor_class()()
    random = Random(0)
    for _ in range(500):
        frames, height, width = random.randint(2, 900), random.randint(1, 1200), random.randint(1, 1200)
        least = random.choice([1, 4096, 131072])
        most = random.choice([least + 65536, 786432, 25165824])
        settings = VideoSettings(min_pixels=least, max_pixels=most)
        try:
            expected = video_module().smart_resize(frames, height, width, 2, 32, least, most)
        except ValueError:
            with pytest.raises(ValueError, match="expected sides of at most 200 to 1"):
                settings.resized(frames, height, width)
        else:
            assert settings.resized(frames, height, width) == expected

        total, rate = random.randint(2, 5000), random.choice([7.5, 24.0, 29.97, 60.0])
        fps = random.choice([None, 0.3, 1, 5.5, 1000])
        expected = oracle.sample_frames(VideoMetadata(total_num_frames=total, fps=rate), fps=fps)
        found = VideoSettings().sampled(Footage(total, rate), Video(source=b"", fps=fps))
        np.testing.assert_array_equal(found, expected)


def test_the_cap_on_each_frame_is_that_of_transformers(tmp_path):
    raw = SETTINGS | {"cap_pixels_per_frame": True, "max_video_tokens": 6}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(raw))
    oracle = video_processor_class().from_pretrained(tmp_path)
    settings = VideoSettings.from_dict(raw)
    for frames, height, width in ((4, 64, 80), (9, 300, 200), (2, 500, 31)):
        rows, columns = (side // 8 for side in settings.resized(frames, height, width))
        assert -(-frames // 2) * rows * columns == oracle.get_num_of_video_patches(frames, height, width)
    # 4 blocks of 16 x 16, of at most 6 a frame; without the cap 12, as 16,384 pixels in all allow: (48, 64).
    assert settings.resized(4, 64, 80) == (32, 32)


def test_settings_are_read_where_transformers_looks_for_them(directory, tmp_path):
    assert Processor.from_hf(directory).video_settings.fps == 3
    nested = {"image_processor": IMAGES, "video_processor": SETTINGS | {"fps": 1}}
    (write_hf_directory(tmp_path / "a") / "processor_config.json").write_text(json.dumps(nested))
    assert Processor.from_hf(tmp_path / "a").video_settings.fps == 1
    # As transformers does: without settings of their own, videos take those of images.
    alone = Processor.from_hf(write_hf_directory(tmp_path / "b")).video_settings
    assert (alone.fps, alone.max_pixels, alone.patch_size) == (2, 16384, 8)
    assert pickle.loads(pickle.dumps(Processor.from_hf(directory))).video_settings.fps == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"do_resize": False}, "turn do_resize off"),
        ({"do_sample_frames": False}, "turn do_sample_frames off"),
        ({"num_frames": 8}, "name num_frames"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "videos of 9 to 8 pixels"),
        ({"min_frames": 9, "max_frames": 8}, "videos of 9 to 8 frames"),
        ({"fps": -1}, "-1 frames a second"),
    ],
)
def test_settings_that_make_no_sense_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        VideoSettings.from_dict(raw)


def test_a_video_is_a_path_a_data_uri_bytes_or_its_frames(processor, videos, tmp_path):
    data = videos[0].read_bytes()
    uri = "data:video/mp4;base64," + base64.b64encode(data).decode()
    first = processor.encode_video(Video(source=videos[0]))
    assert first.seconds == pytest.approx((0.2, 1.0, 1.8))  # frames 0 and 4, 8 and 12, 16 and 20
    for source in (str(videos[0]), f"file://{videos[0]}", uri, data):
        again = processor.encode_video(Video(source=source))
        assert again.seconds == first.seconds
        np.testing.assert_array_equal(again.images[2].patches, first.images[2].patches)

    # Its six sampled frames, given as images, taken at 2.5 a second: each is shown.
    frames = []
    for number in (0, 4, 8, 12, 16, 20):
        frames.append(tmp_path / f"{number}.png")
        Image.fromarray(all_frames(videos[0])[number]).save(frames[-1])
    given = processor.encode_video(Video.from_part(part("video", list(map(str, frames))) | {"fps": 2.5}))
    assert given.seconds == pytest.approx((0.2, 1.0, 1.8))
    np.testing.assert_array_equal(given.images[2].patches, first.images[2].patches)
    # Without a rate, 24 a second, as transformers assumes.
    opened = tuple(Image.open(frame) for frame in frames)
    assert processor.encode_video(Video(source=opened)).seconds == pytest.approx((1 / 48, 5 / 48, 9 / 48))


def test_what_is_sampled_may_be_said_beside_the_video(processor, videos):
    def times(**said):
        return processor.encode_video(Video.from_part(part("video", str(videos[0])) | said)).seconds

    assert times(fps=2) == pytest.approx((0.35, 1.65))  # 4.2 frames: 0, 7, 13, 20
    assert times(num_frames=2) == pytest.approx((1.0,))
    assert len(times(fps=1000)) == 5  # as many as max_frames, 9, the last one twice
    assert times(num_frames=3) == pytest.approx((0.5, 2.0))


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ({"video": None}, "carries 'None'; expected a path, a data URI or a list of frame images"),
        ({"video": ["a.png", 3]}, "expected a path, a data URI or a list of frame images"),
        ({"video": []}, "video of 0 frames: 0 frames; expected at least 2"),
        ({"video": "gone.mp4"}, "video 'gone.mp4' can not be read: No such file"),
        ({"video": "http://a/b.mp4"}, "is a web address; expected a path or a data URI"),
        ({"video": "data:video/mp4;base64"}, "holds no data; expected data:video/mp4;base64"),
        ({"video": "data:video/mp4;base64,?"}, "is not base64; expected data:video/mp4;base64"),
        ({"video": "LONG", "nframes": 4}, "a video part has nframes; expected video, and fps or num_frames"),
        ({"video": "LONG", "fps": "2"}, "fps '2', num_frames None; expected numbers"),
        ({"video": "LONG", "fps": 0}, "fps is 0; expected a positive number"),
        ({"video": "LONG", "fps": float("nan")}, "fps is nan; expected a positive number"),
        ({"video": "LONG", "fps": 2, "num_frames": 4}, "fps and num_frames; expected one of them"),
        ({"video": "LONG", "num_frames": 10**9}, r"num_frames 1000000000; expected 1 to 9 \(max_frames\)"),
        ({"video": "LONG", "num_frames": 1}, "1 frames; expected at least 2"),
        ({"video": ["a.png", "b.png"], "num_frames": 4}, "num_frames beside the frames of a video"),
        ({"video": ["gone.png", "gone.png"]}, "image 'gone.png' can not be read"),
    ],
)
def test_what_can_not_be_shown_is_said_in_a_line(processor, videos, shown, message):
    shown = shown | {"video": str(videos[0])} if shown["video"] == "LONG" else shown
    with pytest.raises(ValueError, match=message) as error:
        processor.encode_messages([{"role": "user", "content": [{"type": "video", **shown}]}])
    assert "\n" not in str(error.value)


def test_frames_must_be_of_one_size():
    frames = tuple(Image.new("RGB", size) for size in ((40, 30), (40, 30), (30, 40)))
    with pytest.raises(ValueError, match="frame 2 of a video has 30 x 40 pixels; expected 40 x 30, as the first has"):
        encode_video(Video(source=frames), VideoSettings())
    with pytest.raises(ValueError, match="video of 6432 x 32 pixels; expected sides of at most 200 to 1"):
        encode_video(Video(source=(Image.new("RGB", (6432, 32)),) * 2), VideoSettings())


def test_a_frame_with_alpha_is_put_on_white():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    patches = encode_video(Video(source=(clear, clear)), VideoSettings()).images[0].patches
    np.testing.assert_allclose(patches, 1.0, atol=1e-6)


def test_videos_and_parts_must_match(processor, videos):
    messages = [{"role": "user", "content": [{"type": "video"}, said("?")]}]
    with pytest.raises(ValueError, match="the messages have 1 video parts; 0 videos came with them"):
        processor.encode_messages(messages, [], [])
    assert len(processor.encode_messages(messages, [], [Video(source=videos[0])]).images) == 3
