"""Tensors of a directory of safetensors files: found and checked at once, read when they are used."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class CheckpointError(ValueError):
    """A checkpoint directory is not what it should be; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file, not yet read."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Mapped from disk: pages are read when they are used."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def stored_tensors(directory: Path, rename: Callable[[str], str]) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files, by name, renamed.

    Raises CheckpointError for a file that is missing, cut short, or not safetensors.
    """
    index = directory / INDEX
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors file; expected a Hugging Face checkpoint directory")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= {rename(name): tensor for name, tensor in _stored_in(directory / file).items()}
    return tensors


def _stored_in(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; {INDEX} names it")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{file} is cut short or is not a safetensors file ({size} bytes)") from None
    if 8 + length + end != size:
        raise CheckpointError(f"{file} is cut short or damaged: {size} bytes, its header says {8 + length + end}")
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {name} is {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{file}: {name} of shape {shape} takes {end - begin} bytes; the header is damaged")
        tensors[name] = StoredTensor(file=file, offset=8 + length + begin, shape=shape, dtype=dtype)
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; expected a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
