"""ArrayRecord that tensorflow-datasets prepared: the same examples as from parquet, and errors that name the file."""

import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo_jax.data.array_record import ArrayRecordRows
from hdpo_jax.data.conversations import ConversationDataset
from hdpo_jax.data.pipeline import batches
from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.rows import DataError

tfds = pytest.importorskip("tensorflow_datasets")

ROWS = 23


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def prompt_row(index: int) -> dict:
    images = [picture(index + k) for k in range(index % 3)]
    return {
        "data_source": "test",
        "prompt": [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": "<image>" * len(images) + f"Où est-ce, n° {index}?"},
        ],
        "images": [{"bytes": image} for image in images],
        "reward_model": {"ground_truth": [str(index), "ü"]},
        "extra_info": {"index": index, "legible": index % 2 == 0, "plate": [1, 2, index]},
    }


def conversation_row(index: int) -> dict:
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"It is {index}."}]
    return {"messages": json.dumps(messages), "images": [picture(index)]}


class Prompts(tfds.core.GeneratorBasedBuilder):
    """As in parquet, but that images are features of their own and no structs."""

    VERSION = tfds.core.Version("1.0.0")
    make_row = staticmethod(prompt_row)

    def _info(self):
        text, sequence = tfds.features.Text(), tfds.features.Sequence
        features = {
            "data_source": text,
            "prompt": sequence({"role": text, "content": text}),
            "images": sequence(tfds.features.Image(encoding_format="jpeg")),
            "reward_model": {"ground_truth": sequence(text)},
            "extra_info": {"index": np.int64, "legible": np.bool_, "plate": sequence(np.int32)},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(ROWS), "test": self._generate_examples(5)}

    def _generate_examples(self, count=0):
        for index in range(count):
            row = self.make_row(index)
            files = (image["bytes"] if isinstance(image, dict) else image for image in row["images"])
            yield index, row | {"images": [io.BytesIO(file) for file in files]}


class Conversations(Prompts):
    make_row = staticmethod(conversation_row)

    def _info(self):
        images = tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg"))
        features = tfds.features.FeaturesDict({"messages": tfds.features.Text(), "images": images})
        return tfds.core.DatasetInfo(builder=self, features=features)


def prepare(folder, builder=Prompts, file_format="array_record"):
    """Where the builder wrote its splits "train", in three shards, and "test"."""
    made = builder(data_dir=folder, file_format=file_format)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=3)
    made.download_and_prepare(download_config=config)
    return made.data_path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def copy(prompts, tmp_path):
    return shutil.copytree(prompts, tmp_path / "copy")


def by_index(dataset):
    return sorted(dataset, key=lambda prompt: prompt.extra["index"])


def test_the_same_prompts_as_from_parquet(prompts, tmp_path):
    rows = [prompt_row(index) for index in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    ours, parquet = by_index(PromptDataset(prompts)), list(PromptDataset(tmp_path / "a.parquet"))
    assert len(ours) == ROWS
    for one, other in zip(ours, parquet, strict=True):
        assert (one.messages, one.images, one.ground_truth, one.extra) == (
            other.messages,
            other.images,
            other.ground_truth,
            other.extra,
        )


def test_conversations(tmp_path):
    dataset = ConversationDataset(prepare(tmp_path, Conversations))
    answers = sorted(conversation.messages[-1]["content"] for conversation in dataset)
    assert answers == sorted(f"It is {index}." for index in range(ROWS))


def test_a_split_is_named_behind_the_folder(prompts):
    assert len(PromptDataset(prompts)) == len(PromptDataset(prompts / "train")) == ROWS
    assert len(PromptDataset(prompts / "test")) == 5
    with pytest.raises(DataError, match=r"has no split tests \(it has test, train\)"):
        PromptDataset(prompts / "tests")


def test_ids_name_the_shard_and_the_row(prompts):
    rows = ArrayRecordRows(prompts, ("extra_info",))
    places = [rows.location(index) for index in range(ROWS)]
    assert len(set(places)) == ROWS
    assert {file for file, _ in places} == {f"prompts-train.array_record-0000{n}-of-00003" for n in range(3)}
    assert [row for file, row in places if file.endswith("1-of-00003")] == list(
        range(7)
    )  # 23 rows in 3 shards: 8, 7, 8


def test_grain_shuffles_and_resumes_them(prompts):
    def taken(iterator, count):
        return [[prompt.id for prompt in next(iterator)] for _ in range(count)]

    dataset = PromptDataset(prompts)
    whole = batches(dataset, batch_size=4, seed=1)
    expected = taken(whole, 9)
    assert len({id for batch in expected[:5] for id in batch}) == 20
    first = batches(dataset, batch_size=4, seed=1)
    taken(first, 4)
    resumed = batches(PromptDataset(prompts), batch_size=4, seed=1, workers=1)
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    assert taken(resumed, 5) == expected[4:]
    resumed.close()


def test_a_copy_for_another_process_carries_no_open_file(prompts):
    dataset = PromptDataset(prompts)
    copy = pickle.dumps(dataset)
    assert len(copy) < 5_000
    assert pickle.loads(copy)[2].id == dataset[2].id


def test_tensorflow_is_not_imported(prompts):
    code = (
        "import sys; from hdpo_jax.data.prompts import PromptDataset; "
        f"print(PromptDataset({str(prompts)!r})[0].id, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["prompts-train.array_record-00000-of-00003:0", "False"]


def test_other_columns_are_named(tmp_path):
    with pytest.raises(DataError, match="has no column prompt and no reward_model .it has images, messages.: it holds"):
        PromptDataset(prepare(tmp_path, Conversations))


def test_other_formats_are_refused(copy):
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="holds tfrecord files; expected array_record"):
        PromptDataset(copy)


def test_a_missing_shard_is_named(copy):
    (copy / "prompts-train.array_record-00001-of-00003").unlink()
    with pytest.raises(DataError, match="has no prompts-train.array_record-00001-of-00003, which its description"):
        PromptDataset(copy)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "middle"])
def test_a_damaged_shard_is_one_line(copy, damage):
    shard = copy / "prompts-train.array_record-00001-of-00003"
    data = shard.read_bytes()
    middle = data[:300] + bytes(255 - byte for byte in data[300:2_000]) + data[2_000:]
    shard.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "garbage": b"x" * 5_000, "middle": middle}[damage])
    with pytest.raises(DataError, match=str(copy)) as caught:
        PromptDataset(copy)
    assert "\n" not in str(caught.value)


def test_a_damaged_description_is_one_line(copy):
    (copy / "features.json").write_text("{")
    with pytest.raises(DataError, match="can not be read as a prepared data set") as caught:
        PromptDataset(copy)
    assert "\n" not in str(caught.value)
