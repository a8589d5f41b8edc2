"""HF -> Orbax -> HF changes nothing, and a checkpoint exports by itself."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from hdpo_jax.evaluate.convert import export_hf, import_hf
from hdpo_jax.train.checkpoint import SavedRunError


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def as_bfloat16(model: Path, copy: Path) -> Path:
    """The same model with bf16 tensors, as checkpoints are published."""
    shutil.copytree(model, copy)
    save_file(
        {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors(model).items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((copy / "config.json").read_text())
    for section in (config, config["text_config"], config["vision_config"]):
        section.pop("torch_dtype", None)
        section["dtype"] = "bfloat16"
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_for_bit(tiny_model: Path, tmp_path: Path, dtype: str):
    source = tiny_model if dtype == "float32" else as_bfloat16(tiny_model, tmp_path / "bf16")
    import_hf(source, tmp_path / "checkpoint")
    # The checkpoint knows its base: the source may be gone.
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert same_bits(tensors(source), tensors(tmp_path / "back"))
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "back", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    text = "<answer>AEG</answer>"
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text) == AutoTokenizer.from_pretrained(source)(text)


def test_dtype_of_an_export_can_be_chosen(tiny_model: Path, tmp_path: Path):
    import_hf(tiny_model, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out", "bfloat16")
    expected = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors(tiny_model).items()}
    assert same_bits(tensors(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_import_does_not_overwrite(tiny_model: Path, tmp_path: Path):
    import_hf(tiny_model, tmp_path / "checkpoint")
    with pytest.raises(SavedRunError, match="holds a checkpoint already"):
        import_hf(tiny_model, tmp_path / "checkpoint")


def test_export_of_nothing_says_what_is_missing(tmp_path: Path):
    with pytest.raises(SavedRunError, match="holds nothing; expected a run directory"):
        export_hf(tmp_path / "nowhere", tmp_path / "out")
