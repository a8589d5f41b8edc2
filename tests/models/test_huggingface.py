"""Checkpoints there and back, bit for bit; what does not fit is refused in one line."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from models.qwen3_vl import CheckpointError, Qwen3VL, load_hf, save_hf
from models.qwen3_vl.stored_layers import read_layer_by_layer
from sharding import make_mesh
from tests.models.oracles import CONFIGS, hf_inputs, oracle, row

FILE = "model.safetensors"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A checkpoint to be damaged."""
    target = tmp_path / "base"
    shutil.copytree(oracle("biased, untied").directory, target)
    return target


def same(first: Path, second: Path) -> bool:
    return _bytes(first) == _bytes(second)


def _bytes(directory: Path) -> dict[str, tuple]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= {name: (value.dtype, value.shape, value.tobytes()) for name, value in load_file(file).items()}
    return tensors


def loaded_by_transformers(directory: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_bit_for_bit(name, tmp_path):
    base = Path(oracle(name).directory)
    save_hf(load_hf(base), tmp_path / "saved", base=base)
    assert same(base, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())


def test_bfloat16_files_stay_bfloat16(tmp_path, directory):
    """Also by way of fp32 master weights: every bfloat16 is an fp32."""
    hf = transformers.Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path / "half")
    model = load_hf(tmp_path / "half", param_dtype=jnp.float32)
    save_hf(model, tmp_path / "saved", base=tmp_path / "half")
    assert same(tmp_path / "half", tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    save_hf(model, tmp_path / "wide", base=tmp_path / "half", dtype=jnp.float32)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert {dtype for dtype, *_ in _bytes(tmp_path / "wide").values()} == {np.dtype(np.float32)}


def test_saved_in_parts_from_eight_devices_and_loaded_by_transformers(tmp_path, directory):
    """With the companions of the base, and without what describes the base alone."""
    for name in ("tokenizer.json", "preprocessor_config.json", "README.md", "pytorch_model.bin"):
        (directory / name).write_text("{}")
    model = load_hf(directory, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    save_hf(model, tmp_path / "saved", base=directory, max_shard_bytes=30_000)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "config.json", "model.safetensors.index.json"} <= names
    assert not {"README.md", "pytorch_model.bin", FILE} & names
    assert same(directory, tmp_path / "saved")
    save_hf(load_hf(tmp_path / "saved"), tmp_path / "again")
    assert same(directory, tmp_path / "again")
    pair = oracle("biased, untied")
    inputs = hf_inputs(row(pair.config, [(1, 2)]))
    with torch.no_grad():
        expected = pair.hf(**inputs).logits
        for saved in ("saved", "again"):
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                tmp_path / saved, dtype=torch.float32
            )
            torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_new_model_saves_without_a_base(tmp_path):
    config = oracle("tied, taps out of order").config
    model = Qwen3VL(config, rngs=nnx.Rngs(1), param_dtype=jnp.bfloat16)
    save_hf(model, tmp_path / "new")
    hf = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "new")
    table = hf.state_dict()["model.language_model.embed_tokens.weight"]
    assert table.dtype == torch.bfloat16
    np.testing.assert_array_equal(table.float().numpy(), np.asarray(model.embedding[...].astype(jnp.float32)))


def as_on_the_hub(source: Path, target: Path) -> Path:
    """A copy of a checkpoint, its experts stored [experts, inputs, outputs]."""
    shutil.copytree(source, target)
    tensors = load_file(target / FILE)
    experts = {
        name: np.ascontiguousarray(value.swapaxes(1, 2)) for name, value in tensors.items() if ".experts." in name
    }
    assert experts
    save_file(tensors | experts, target / FILE, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["experts in all layers", "experts in some layers"])
def test_both_layouts_of_experts_are_one_model(name, tmp_path):
    """Also where the tensors into the experts are square, so that only those out of them tell which layout it is."""
    pair = oracle(name)
    hub = as_on_the_hub(Path(pair.directory), tmp_path / "hub")
    model = load_hf(hub)
    for ours, expected in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(pair.model)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    save_hf(model, tmp_path / "saved", base=hub)
    # The layout stays, but where transformers would take a square tensor for one of its own.
    assert same(tmp_path / "saved", Path(pair.directory) if name == "experts in all layers" else hub)
    inputs = hf_inputs(row(pair.config, [(1, 2)]))
    with torch.no_grad():
        found = loaded_by_transformers(tmp_path / "saved")(**inputs).logits
        torch.testing.assert_close(found, pair.hf(**inputs).logits)


def test_experts_stored_in_two_layouts_are_refused(tmp_path):
    target = as_on_the_hub(Path(oracle("experts in all layers").directory), tmp_path / "mixed")
    name = "model.language_model.layers.1.mlp.experts.down_proj"

    def turn_back(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    rewrite(target, turn_back)
    with pytest.raises(
        CheckpointError, match=r"layers\.0.*down_proj is stored as on the hub, .*layers\.1.*down_proj as by"
    ):
        load_hf(target)

    def cut(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:, :, 1:])

    rewrite(target, cut)
    with pytest.raises(
        CheckpointError, match=r"1 of the wrong shape: .*down_proj \[8, 32, 15\] instead of \[8, 16, 32\]"
    ):
        load_hf(target)


def test_the_host_holds_one_layer_of_experts_at_a_time():
    """They are most of a model, and one parameter."""
    shape = (16, 8, 256, 256)
    sharding = NamedSharding(make_mesh({"fsdp": 8}), PartitionSpec(None, "fsdp"))

    def read(number: int, index: tuple[slice, ...]) -> np.ndarray:
        return np.broadcast_to(np.float32(number), shape[1:])[index].copy()

    tracemalloc.start()
    stack = read_layer_by_layer(read, shape, np.dtype(np.float32), sharding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stack.sharding == sharding
    np.testing.assert_array_equal(stack[:, 3, 2, 1], np.arange(16))
    # A sixteenth, and the next one; all layers at once would be 1.
    assert peak < 0.3 * stack.nbytes


def test_names_of_older_versions(directory):
    tensors = load_file(directory / FILE)
    older = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in tensors.items()
    }
    save_file(older, directory / FILE)
    model = load_hf(directory)
    expected = tensors["model.language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(model.embedding[...]), expected)


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE)


def drop(tensors):
    for number in range(3):
        del tensors[f"model.language_model.layers.{number}.mlp.up_proj.weight"]
    del tensors["model.visual.merger.norm.bias"]


def add(tensors):
    tensors["model.language_model.layers.3.mlp.up_proj.weight"] = np.zeros((52, 36), np.float32)


def transpose(tensors):
    name = "model.visual.blocks.1.mlp.linear_fc1.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def integers(tensors):
    tensors["model.visual.merger.norm.bias"] = np.zeros(24, np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"4 missing: .*layers\.0\.mlp\.up_proj\.weight, .*, \.\.\.$"),
        (add, r"1 not expected: .*layers\.3\.mlp\.up_proj\.weight$"),
        (transpose, r"1 of the wrong shape: .*linear_fc1\.weight \[24, 40\] instead of \[40, 24\]$"),
        (integers, r"norm\.bias is I32; expected one of BF16, F16, F32, F64$"),
    ],
)
def test_tensors_that_do_not_match(directory, change, message):
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_hf(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_files_that_are_cut_short(directory, keep):
    data = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=f"{FILE} is cut short"):
        load_hf(directory)


def test_directories_that_are_no_checkpoint(directory):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match="gone.safetensors is missing"):
        load_hf(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_hf(directory)
    (directory / "model.safetensors.index.json").unlink()
    (directory / FILE).unlink()
    with pytest.raises(CheckpointError, match="holds no .*safetensors file"):
        load_hf(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type 'llama'; only 'qwen3_vl'"):
        load_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        load_hf(directory)


def test_nothing_half_written_stays(directory, tmp_path, monkeypatch):
    model = load_hf(directory)
    before = sorted(tmp_path.rglob("*"))

    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("models.qwen3_vl.shards.save_file", full)
    for target in (tmp_path / "new", directory):
        with pytest.raises(OSError, match="no space left"):
            save_hf(model, target, base=directory)
    assert sorted(tmp_path.rglob("*")) == before
    load_hf(directory)


def test_where_it_may_be_saved(directory, tmp_path):
    model = load_hf(directory)
    save_hf(model, directory, base=directory)  # over the base itself
    load_hf(directory)
    # A run's directory holds a config.json too; its checkpoints are not to be thrown away.
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no model directory"):
        save_hf(model, run, base=directory)
    with pytest.raises(CheckpointError, match="model of other sizes"):
        save_hf(model, tmp_path / "new", base=oracle("tied, taps out of order").directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
