"""Hugging Face checkpoints: safetensors -> sharded parameters, and back, bit for bit.

Tensors are mapped from disk and only the bytes that a device holds are read, one parameter at a time: neither loading
nor saving needs the whole model in host memory.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.layers import Remat
from models.qwen3_vl.model import Qwen3VL
from sharding import param_shardings
from sharding.multihost import barrier, is_lead

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
Path_ = tuple[str | int, ...]


class CheckpointError(ValueError):
    """A checkpoint directory is not what it should be; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where one tensor of a file belongs."""

    path: Path_
    """Path of the parameter in the model's state."""
    layer: int | None
    """Which layer of a stacked parameter; None: all of it."""
    shape: tuple[int, ...]
    """Shape in the file."""
    transposed: bool
    """The file holds [outputs, inputs], the model [inputs, outputs], each side of one or several dimensions."""


# -- names --------------------------------------------------------------------------------------------------------


def tensor_places(config: Qwen3VLConfig) -> dict[str, TensorPlace]:
    """Every tensor of a checkpoint by its name, and where it belongs."""
    places: dict[str, TensorPlace] = {}

    def add(name: str, path: Path_, shape: tuple[int, ...], *, layer: int | None = None, transposed: bool = False):
        places[name] = TensorPlace(path=path, layer=layer, shape=shape, transposed=transposed)

    def add_linear(name: str, path: Path_, outputs: int, inputs: int, *, bias: bool, layer: int | None = None):
        add(f"{name}.weight", (*path, "kernel"), (outputs, inputs), layer=layer, transposed=True)
        if bias:
            add(f"{name}.bias", (*path, "bias"), (outputs,), layer=layer)

    def add_layer_norm(name: str, path: Path_, size: int, *, layer: int | None = None):
        add(f"{name}.weight", (*path, "scale"), (size,), layer=layer)
        add(f"{name}.bias", (*path, "bias"), (size,), layer=layer)

    text, vision = config.text, config.vision
    width, size = text.hidden_size, text.head_dim
    add("model.language_model.embed_tokens.weight", ("embedding",), (text.vocab_size, width))
    add("model.language_model.norm.weight", ("decoder", "norm", "scale"), (width,))
    if not config.tie_word_embeddings:
        add("lm_head.weight", ("output",), (text.vocab_size, width), transposed=True)
    query, shared = text.num_attention_heads * size, text.num_key_value_heads * size
    for layer in range(text.num_hidden_layers):
        name, path = f"model.language_model.layers.{layer}", ("decoder", "layers")
        bias = text.attention_bias
        add_linear(f"{name}.self_attn.q_proj", (*path, "query"), query, width, bias=bias, layer=layer)
        add_linear(f"{name}.self_attn.k_proj", (*path, "key"), shared, width, bias=bias, layer=layer)
        add_linear(f"{name}.self_attn.v_proj", (*path, "value"), shared, width, bias=bias, layer=layer)
        add_linear(f"{name}.self_attn.o_proj", (*path, "out"), width, query, bias=bias, layer=layer)
        add_linear(f"{name}.mlp.gate_proj", (*path, "gate"), text.intermediate_size, width, bias=False, layer=layer)
        add_linear(f"{name}.mlp.up_proj", (*path, "up"), text.intermediate_size, width, bias=False, layer=layer)
        add_linear(f"{name}.mlp.down_proj", (*path, "down"), width, text.intermediate_size, bias=False, layer=layer)
        for theirs, ours, length in (
            ("input_layernorm", "attention_norm", width),
            ("post_attention_layernorm", "mlp_norm", width),
            ("self_attn.q_norm", "query_norm", size),
            ("self_attn.k_norm", "key_norm", size),
        ):
            add(f"{name}.{theirs}.weight", (*path, ours, "scale"), (length,), layer=layer)

    width = vision.hidden_size
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patch = ("vision", "patch_embedding")
    add("model.visual.patch_embed.proj.weight", (*patch, "kernel"), (width, *kernel), transposed=True)
    add("model.visual.patch_embed.proj.bias", (*patch, "bias"), (width,))
    positions = (vision.num_position_embeddings, width)
    add("model.visual.pos_embed.weight", ("vision", "position_table"), positions)
    for layer in range(vision.depth):
        name, path = f"model.visual.blocks.{layer}", ("vision", "layers")
        add_linear(f"{name}.attn.qkv", (*path, "qkv"), 3 * width, width, bias=True, layer=layer)
        add_linear(f"{name}.attn.proj", (*path, "out"), width, width, bias=True, layer=layer)
        add_linear(f"{name}.mlp.linear_fc1", (*path, "up"), vision.intermediate_size, width, bias=True, layer=layer)
        add_linear(f"{name}.mlp.linear_fc2", (*path, "down"), width, vision.intermediate_size, bias=True, layer=layer)
        add_layer_norm(f"{name}.norm1", (*path, "attention_norm"), width, layer=layer)
        add_layer_norm(f"{name}.norm2", (*path, "mlp_norm"), width, layer=layer)
    mergers: list[tuple[str, Path_, int]] = [("model.visual.merger", ("vision", "merger"), width)]
    for number in range(len(vision.deepstack_visual_indexes)):
        name = f"model.visual.deepstack_merger_list.{number}"
        mergers.append((name, ("vision", "deepstack_mergers", number), vision.merged_size))
    for name, path, normed in mergers:
        add_layer_norm(f"{name}.norm", (*path, "norm"), normed)
        add_linear(f"{name}.linear_fc1", (*path, "up"), vision.merged_size, vision.merged_size, bias=True)
        add_linear(f"{name}.linear_fc2", (*path, "down"), vision.out_hidden_size, vision.merged_size, bias=True)
    return places


def _canonical(name: str) -> str:
    """A tensor's name as transformers 5 writes it; older versions left out the inner model's name."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


# -- files --------------------------------------------------------------------------------------------------------


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


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files, under its canonical name.

    Raises CheckpointError for a file that is missing, cut short, or not safetensors.
    """
    index = directory / INDEX
    if index.exists():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors file; expected a Hugging Face checkpoint directory")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _stored_in(directory / file)
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
        tensors[_canonical(name)] = StoredTensor(file=file, offset=8 + length + begin, shape=shape, dtype=dtype)
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; expected a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None


def _check(stored: Mapping[str, StoredTensor], places: Mapping[str, TensorPlace], directory: Path) -> None:
    """Raises CheckpointError unless the files hold just what the config asks for."""
    problems = {
        "missing": [name for name in places if name not in stored],
        "not expected": [name for name in stored if name not in places],
        "of the wrong shape": [
            f"{name} {list(stored[name].shape)} instead of {list(place.shape)}"
            for name, place in places.items()
            if name in stored and stored[name].shape != place.shape
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"{directory}: tensors do not match config.json; {'; '.join(found)}")


# -- load ---------------------------------------------------------------------------------------------------------


def read_config(directory: str | os.PathLike[str]) -> Qwen3VLConfig:
    """The config.json of a checkpoint directory."""
    file = Path(directory) / "config.json"
    raw = _read_json(file)
    try:
        return Qwen3VLConfig.from_hf(raw)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def load_hf(
    directory: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
    remat: Remat = "full",
) -> Qwen3VL:
    """The model of a Hugging Face directory, its parameters sharded over `mesh` (None: on the default device).

    Raises CheckpointError, one line, for another architecture, files cut short, and tensors that are missing, surplus
    or of another shape than config.json says.
    """
    directory = Path(directory)
    config = read_config(directory)
    places = tensor_places(config)
    stored = stored_tensors(directory)
    if config.tie_word_embeddings:
        # Some files hold the tied matrix twice.
        stored.pop("lm_head.weight", None)
    _check(stored, places, directory)
    sources: dict[Path_, list[tuple[TensorPlace, StoredTensor]]] = {}
    for name, place in places.items():
        sources.setdefault(place.path, []).append((place, stored[name]))

    def build() -> Qwen3VL:
        return Qwen3VL(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype, remat=remat)

    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    if mesh is None:
        here = jnp.zeros(()).sharding  # the default device's
        shardings = jax.tree.map(lambda _: here, abstract)
    else:
        shardings = param_shardings(abstract, mesh)

    def read(path: Any, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            return _read_shard(sources[path], shape, index).astype(dtype)

        return jax.make_array_from_callback(shape, sharding, shard)

    filled = [
        (path, leaf.replace(read(path, leaf.shape, leaf.dtype, sharding.get_value())))
        for (path, leaf), (_, sharding) in zip(nnx.to_flat_state(abstract), nnx.to_flat_state(shardings), strict=True)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _read_shard(
    tensors: list[tuple[TensorPlace, StoredTensor]], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of a parameter, in the dtype of the file."""
    if tensors[0][0].layer is None:
        place, stored = tensors[0]
        return np.array(_to_model(stored.read(), place, shape)[index])
    layers, inner = tensors[index[0]], index[1:]
    return np.stack([_to_model(stored.read(), place, shape[1:])[inner] for place, stored in layers])


def _to_model(tensor: np.ndarray, place: TensorPlace, shape: tuple[int, ...]) -> np.ndarray:
    """A file's tensor as the model holds it: a view."""
    return tensor.reshape(len(tensor), -1).T.reshape(shape) if place.transposed else tensor.reshape(shape)


def _to_file(tensor: np.ndarray, place: TensorPlace) -> np.ndarray:
    if place.transposed:
        tensor = tensor.reshape(-1, place.shape[0]).T
    return tensor.reshape(place.shape)


# -- save ---------------------------------------------------------------------------------------------------------


def save_hf(
    model: Qwen3VL,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the model as a Hugging Face directory that transformers loads as it is.

    base: the directory the model came from; its tokenizer, processor and other small files are copied.
    dtype: of the tensors written; by default that of the base's tensors, or else that of the parameters.
    Written beside `directory` first and then renamed: nothing half-written stays. All processes must call it, one
    writes. Raises CheckpointError where `base` describes another model or `directory` holds something else.
    """
    directory = Path(directory)
    places = tensor_places(model.config)
    config = model.config.to_hf()
    stored: dict[str, StoredTensor] = {}
    if base is not None:
        if read_config(base) != model.config:
            raise CheckpointError(f"{base} describes a model of other sizes than the one to be saved")
        config = _read_json(Path(base) / "config.json")
        # A base may be a tokenizer and a config only, where a model was trained from scratch.
        with contextlib.suppress(CheckpointError):
            stored = stored_tensors(Path(base))
    if directory.exists() and any(directory.iterdir()) and not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} is not empty and holds no model; choose another place to save to")
    dtypes = {name: np.dtype(dtype) if dtype else _stored_dtype(stored, name, model) for name in places}
    _set_dtype(config, dtypes["model.language_model.embed_tokens.weight"])

    tensors = _host_tensors(model, places, dtypes)
    if not is_lead():
        for _ in tensors:
            pass
        barrier("save_hf")
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        partial.chmod(0o755)
        if base is not None:
            _copy_companions(Path(base), partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_shards(partial, tensors, places, dtypes, max_shard_bytes)
        _replace(directory, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    barrier("save_hf")


def _stored_dtype(stored: Mapping[str, StoredTensor], name: str, model: Qwen3VL) -> np.dtype:
    return stored[name].dtype if name in stored else np.dtype(model.embedding[...].dtype)


def _set_dtype(config: dict[str, Any], dtype: np.dtype) -> None:
    """Names the dtype wherever a config already does, in the old words or the new, and at the top."""
    config.setdefault("dtype" if "torch_dtype" not in config else "torch_dtype", dtype.name)
    for section in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = dtype.name


def _host_tensors(
    model: Qwen3VL, places: Mapping[str, TensorPlace], dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as the file holds it, one at a time in host memory."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {path: variable[...] for path, variable in params}
    for name, place in places.items():
        array = arrays[place.path] if place.layer is None else arrays[place.path][place.layer]
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        yield name, np.ascontiguousarray(_to_file(np.asarray(array), place).astype(dtypes[name]))


def _write_shards(
    directory: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    places: Mapping[str, TensorPlace],
    dtypes: Mapping[str, np.dtype],
    max_bytes: int,
) -> None:
    """model.safetensors, or numbered files and their index where one file would be larger than `max_bytes`."""
    sizes = {name: math.prod(place.shape) * dtypes[name].itemsize for name, place in places.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(next(tensors) for _ in names), directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_companions(base: Path, target: Path) -> None:
    """Tokenizer, processor and generation settings: all that is neither weights nor about the base itself."""
    for entry in base.iterdir():
        if entry.name.startswith(".") or entry.name == "README.md" or entry.name.endswith(WEIGHT_SUFFIXES):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name)
        else:
            shutil.copy(entry, target / entry.name)


def _replace(directory: Path, new: Path) -> None:
    """`new` under the name of `directory`; what stood there goes only once the new one is in place."""
    if not directory.exists():
        new.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    directory.rename(old / directory.name)
    new.rename(directory)
    shutil.rmtree(old)
