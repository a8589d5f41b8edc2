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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from models.policy import PolicyConfig
from models.qwen3_vl.attention import kernel_for
from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.layers import Remat
from models.qwen3_vl.model import Qwen3VL
from models.qwen3_vl.shards import on_host, write_files
from models.qwen3_vl.stored import CheckpointError, StoredTensor, read_json, stored_tensors
from models.qwen3_vl.stored_layers import (
    ExpertLayout,
    expert_layout,
    expert_shapes,
    layout_to_save,
    read_layer_by_layer,
    stored_layers,
)
from sharding import param_shardings
from sharding.multihost import gather, is_lead, together

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
StatePath = tuple[str | int, ...]
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where one tensor of a file belongs."""

    path: StatePath
    """Path of the parameter in the model's state."""
    layer: int | None
    """Which layer of a stacked parameter; None: all of it."""
    shape: tuple[int, ...]
    """Shape in the file."""
    transposed: bool
    """The file holds [outputs, inputs], the model [inputs, outputs], each side of one or several dimensions."""
    of_experts: bool = False
    """Such a matrix for each expert, on a leading dimension."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """What differs between the files of one architecture and another's with the same decoder."""

    config: Any
    """The class of its config, which has `from_hf`."""
    model: Any
    """The class of the model."""
    text: str
    """What the names of the decoder's tensors begin with."""


CANONICAL_TEXT = "model.language_model."
QWEN3_VL = CheckpointFormat(config=Qwen3VLConfig, model=Qwen3VL, text=CANONICAL_TEXT)


# -- names --------------------------------------------------------------------------------------------------------


def tensor_places(config: PolicyConfig, experts: ExpertLayout = "transformers") -> dict[str, TensorPlace]:
    """Every tensor of a checkpoint by its name (`_canonical`), and its place; `experts`: how a MoE's are stored."""
    places: dict[str, TensorPlace] = {}

    def add(name: str, path: StatePath, shape: tuple[int, ...], *, layer: int | None = None, transposed: bool = False):
        places[name] = TensorPlace(path=path, layer=layer, shape=shape, transposed=transposed)

    def add_linear(name: str, path: StatePath, outputs: int, inputs: int, *, bias: bool, layer: int | None = None):
        add(f"{name}.weight", (*path, "kernel"), (outputs, inputs), layer=layer, transposed=True)
        if bias:
            add(f"{name}.bias", (*path, "bias"), (outputs,), layer=layer)

    def add_layer_norm(name: str, path: StatePath, size: int, *, layer: int | None = None):
        add(f"{name}.weight", (*path, "scale"), (size,), layer=layer)
        add(f"{name}.bias", (*path, "bias"), (size,), layer=layer)

    text, vision = config.text, config.vision
    width, size = text.hidden_size, text.head_dim
    add("model.language_model.embed_tokens.weight", ("embedding",), (text.vocab_size, width))
    add("model.language_model.norm.weight", ("decoder", "norm", "scale"), (width,))
    if not config.tie_word_embeddings:
        add("lm_head.weight", ("output",), (text.vocab_size, width), transposed=True)
    query, shared = text.num_attention_heads * size, text.num_key_value_heads * size
    bias = text.attention_bias
    for name, path, layer, moe in stored_layers(text):
        add_linear(f"{name}.self_attn.q_proj", (*path, "query"), query, width, bias=bias, layer=layer)
        add_linear(f"{name}.self_attn.k_proj", (*path, "key"), shared, width, bias=bias, layer=layer)
        add_linear(f"{name}.self_attn.v_proj", (*path, "value"), shared, width, bias=bias, layer=layer)
        add_linear(f"{name}.self_attn.o_proj", (*path, "out"), width, query, bias=bias, layer=layer)
        if moe is None:
            hidden = text.intermediate_size
            add_linear(f"{name}.mlp.gate_proj", (*path, "gate"), hidden, width, bias=False, layer=layer)
            add_linear(f"{name}.mlp.up_proj", (*path, "up"), hidden, width, bias=False, layer=layer)
            add_linear(f"{name}.mlp.down_proj", (*path, "down"), width, hidden, bias=False, layer=layer)
        else:
            router = (*path, "experts", "router")
            add(f"{name}.mlp.gate.weight", router, (moe.num_experts, width), layer=layer, transposed=True)
            for end, shape in expert_shapes(text, moe, experts).items():
                places[f"{name}.mlp.experts.{end}"] = TensorPlace(
                    path=(*path, "experts", end.removesuffix("_proj")),
                    layer=layer,
                    shape=shape,
                    transposed=experts == "transformers",
                    of_experts=True,
                )
        for theirs, ours, length in (
            ("input_layernorm", "attention_norm", width),
            ("post_attention_layernorm", "mlp_norm", width),
            ("self_attn.q_norm", "query_norm", size),
            ("self_attn.k_norm", "key_norm", size),
        ):
            add(f"{name}.{theirs}.weight", (*path, ours, "scale"), (length,), layer=layer)

    if vision is None:
        return places
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
    mergers: list[tuple[str, StatePath, int]] = [("model.visual.merger", ("vision", "merger"), width)]
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


def _as_stored(of_tensors: Mapping[str, ValueT], form: CheckpointFormat) -> dict[str, ValueT]:
    """With each tensor under the name that it has in the files."""

    def stored(name: str) -> str:
        return form.text + name.removeprefix(CANONICAL_TEXT) if name.startswith(CANONICAL_TEXT) else name

    return {stored(name): value for name, value in of_tensors.items()}


# -- load ---------------------------------------------------------------------------------------------------------


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


def read_config(directory: str | os.PathLike[str], form: CheckpointFormat = QWEN3_VL) -> Any:
    """The config.json of a checkpoint directory."""
    file = Path(directory) / "config.json"
    raw = read_json(file)
    try:
        return form.config.from_hf(raw)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def load_hf(
    directory: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike = jnp.float32,
    remat: Remat = "full",
    form: CheckpointFormat = QWEN3_VL,
) -> Qwen3VL:
    """The model of a Hugging Face directory, its parameters sharded over `mesh` (None: on the default device).

    Raises CheckpointError, one line, for another architecture, files cut short, and tensors that are missing, surplus
    or of another shape than config.json says.
    """
    directory = Path(directory)
    config = read_config(directory, form)
    stored = stored_tensors(directory, _canonical)
    places = tensor_places(config, expert_layout(config.text, stored) or "transformers")
    if config.tie_word_embeddings:
        # Some files hold the tied matrix twice.
        stored.pop("lm_head.weight", None)
    _check(_as_stored(stored, form), _as_stored(places, form), directory)
    sources: dict[StatePath, list[tuple[TensorPlace, StoredTensor]]] = {}
    for name, place in places.items():
        sources.setdefault(place.path, []).append((place, stored[name]))

    def build() -> Qwen3VL:
        kernel = kernel_for(device)
        return form.model(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype, remat=remat, kernel=kernel)

    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    if mesh is None:
        here = jnp.zeros(()).sharding  # the default device's
        shardings = jax.tree.map(lambda _: here, abstract)
    else:
        shardings = param_shardings(abstract, mesh)

    def read(path: Any, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            return _read_shard(sources[path], shape, index).astype(dtype, copy=False)

        def shard_of_layer(number: int, index: Any) -> np.ndarray:
            return shard((slice(number, number + 1), *index))[0]

        if sources[path][0][0].of_experts:
            return read_layer_by_layer(shard_of_layer, shape, dtype, sharding)
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
    if place.transposed and place.of_experts:
        return tensor.swapaxes(1, 2).reshape(shape)
    return tensor.reshape(len(tensor), -1).T.reshape(shape) if place.transposed else tensor.reshape(shape)


def _to_file(tensor: np.ndarray, place: TensorPlace) -> np.ndarray:
    if place.transposed and place.of_experts:
        experts, outputs, inputs = place.shape
        return tensor.reshape(experts, inputs, outputs).swapaxes(1, 2)
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
    form: CheckpointFormat = QWEN3_VL,
) -> None:
    """Writes the model as a Hugging Face directory that transformers loads as it is.

    base: the directory the model came from; its tokenizer, processor and other small files are copied.
    dtype: of the tensors written; by default that of the base's tensors, or else that of the parameters.
    Written beside `directory` first and then renamed: nothing half-written stays. All processes of a job call it, on a
    file system that all of them see; each holds a file's worth of tensors at most, `max_shard_bytes`.
    Raises CheckpointError where `base` describes another model or `directory` holds something else.
    """
    directory = Path(directory)
    config = model.config.to_hf()
    stored: dict[str, StoredTensor] = {}
    if base is not None:
        if read_config(base, form) != model.config:
            raise CheckpointError(f"{base} describes a model of other sizes than the one to be saved")
        config = read_json(Path(base) / "config.json")
        # A base may be a tokenizer and a config only, where a model was trained from scratch.
        with contextlib.suppress(CheckpointError):
            stored = stored_tensors(Path(base), _canonical)
    places = tensor_places(model.config, layout_to_save(model.config.text, stored))
    if directory.exists() and not _replaceable(directory):
        raise CheckpointError(f"{directory} is there and is no model directory; choose another place to save to")
    dtypes = {name: np.dtype(dtype) if dtype else _stored_dtype(stored, name, model) for name in places}
    _set_dtype(config, dtypes["model.language_model.embed_tokens.weight"])
    places, dtypes = _as_stored(places, form), _as_stored(dtypes, form)

    sizes = {name: math.prod(place.shape) * dtypes[name].itemsize for name, place in places.items()}
    with _written_beside(directory) as partial:
        with together():
            if is_lead():
                if base is not None:
                    _copy_companions(Path(base), partial)
                (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_files(partial, sizes, file_tensors(model, places, dtypes), max_shard_bytes)


@contextlib.contextmanager
def _written_beside(directory: Path) -> Iterator[Path]:
    """A folder for all processes to write to, which takes the place of `directory` once they have; or goes away."""
    partial = None
    with together():
        if is_lead():
            directory.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
            partial.chmod(0o755)
    partial = directory.parent / gather(partial and partial.name)[0]
    try:
        yield partial
        with together():
            if is_lead():
                _replace(directory, partial)
    finally:
        if is_lead():
            shutil.rmtree(partial, ignore_errors=True)


def _stored_dtype(stored: Mapping[str, StoredTensor], name: str, model: Qwen3VL) -> np.dtype:
    return stored[name].dtype if name in stored else np.dtype(model.embedding[...].dtype)


def _set_dtype(config: dict[str, Any], dtype: np.dtype) -> None:
    """Names the dtype wherever a config already does, in the old words or the new, and at the top."""
    config.setdefault("dtype" if "torch_dtype" not in config else "torch_dtype", dtype.name)
    for section in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = dtype.name


def file_tensors(
    model: Qwen3VL, places: Mapping[str, TensorPlace], dtypes: Mapping[str, np.dtype]
) -> Callable[[str, bool], np.ndarray | None]:
    """What gives each tensor as the file holds it, by name, where it is wanted; see `shards.on_host`."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {path: variable[...] for path, variable in params}

    def tensor(name: str, wanted: bool) -> np.ndarray | None:
        place = places[name]
        found = on_host(arrays[place.path], () if place.layer is None else (place.layer,), dtypes[name], wanted)
        return None if found is None else np.ascontiguousarray(_to_file(found, place))

    return tensor


def _replaceable(directory: Path) -> bool:
    """Whether a place is empty, or a model to be overwritten: never a run's directory or somebody's home."""
    if not directory.is_dir():
        return False
    names = {entry.name for entry in directory.iterdir()}
    return not names or ("config.json" in names and any(name.endswith(".safetensors") for name in names))


def _copy_companions(base: Path, target: Path) -> None:
    """Tokenizer, processor and generation settings: all that is neither weights nor about the base itself."""
    for entry in base.iterdir():
        if entry.name.startswith(".") or entry.name == "README.md" or entry.name.endswith(WEIGHT_SUFFIXES):
            continue
        if entry.is_file():
            shutil.copy(entry, target / entry.name)
        elif entry.name == "additional_chat_templates":
            shutil.copytree(entry, target / entry.name)


def _replace(directory: Path, new: Path) -> None:
    """`new` under the name of `directory`; what stood there goes only once the new one is in place."""
    if not directory.exists():
        new.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    directory.rename(old / directory.name)
    new.rename(directory)
    shutil.rmtree(old)
