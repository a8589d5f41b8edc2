"""The architectures there are, by the `model_type` of config.json: checkpoints and processors of any of them."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.policy import PolicyConfig, PolicyProcessor
from models.qwen3 import Qwen3, Qwen3Config
from models.qwen3.processing import TextProcessor
from models.qwen3_vl import huggingface
from models.qwen3_vl.huggingface import QWEN3_VL, CheckpointFormat
from models.qwen3_vl.layers import Remat
from models.qwen3_vl.model import Qwen3VL
from models.qwen3_vl.processing import Processor
from models.qwen3_vl.stored import CheckpointError, read_json


@dataclass(frozen=True, kw_only=True)
class Family:
    """What belongs to a `model_type`."""

    format: CheckpointFormat
    processor: type[Processor]


FAMILIES = {
    "qwen3_vl": Family(format=QWEN3_VL, processor=Processor),
    "qwen3_vl_moe": Family(format=QWEN3_VL, processor=Processor),
    "qwen3": Family(format=CheckpointFormat(config=Qwen3Config, model=Qwen3, text="model."), processor=TextProcessor),
}


def family_of(directory: str | os.PathLike[str]) -> Family:
    """The family of a model directory. Raises CheckpointError, one line, where it is none of these."""
    file = Path(directory) / "config.json"
    found = read_json(file).get("model_type")
    if found not in FAMILIES:
        raise CheckpointError(f"{file} says model_type {found!r}; expected one of {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[found]


def read_config(directory: str | os.PathLike[str]) -> PolicyConfig:
    """The config.json of a checkpoint directory."""
    return huggingface.read_config(directory, family_of(directory).format)


def read_processor(directory: str | os.PathLike[str]) -> PolicyProcessor:
    """Tokenizer, chat template and whatever else turns messages into the model's inputs."""
    return family_of(directory).processor.from_hf(Path(directory))


def load_hf(
    directory: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
    remat: Remat = "full",
) -> Qwen3VL:
    """The model of a Hugging Face directory; see `models.qwen3_vl.huggingface.load_hf`."""
    form = family_of(directory).format
    return huggingface.load_hf(directory, mesh, dtype=dtype, param_dtype=param_dtype, remat=remat, form=form)


def save_hf(
    model: Qwen3VL,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a model of any family for transformers; see `models.qwen3_vl.huggingface.save_hf`."""
    form = FAMILIES[model.config.to_hf()["model_type"]].format
    huggingface.save_hf(model, directory, base, dtype=dtype, form=form)
