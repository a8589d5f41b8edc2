"""`hdpo import-hf` and `hdpo export-hf`: HF safetensors to an Orbax checkpoint and back."""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from hdpo_jax.algorithm.state import TrainState
from hdpo_jax.config import Dtype, ModelConfig
from hdpo_jax.train.checkpoint import Checkpointer, SavedRunError, base_directory, load_metadata, load_params
from models.families import family_of, load_hf, read_config, save_hf
from sharding import MeshAxes, make_mesh, param_shardings


def import_hf(model: Path, checkpoint: Path) -> None:
    """Writes the model of an HF directory to `checkpoint`, laid out as a run directory at step 0.

    Parameters are kept in fp32, which holds bf16 and fp16 exactly. Raises SavedRunError where `checkpoint` holds
    one already.
    """
    settings = ModelConfig(path=str(model), param_dtype="float32")
    loaded = load_hf(model, make_mesh(MeshAxes()), param_dtype=jnp.float32)
    state = TrainState(params=nnx.split(loaded)[1], opt_state=(), step=jnp.int32(0))
    metadata = {"config": {"model": {"path": settings.path, "param_dtype": settings.param_dtype}}}
    with contextlib.closing(Checkpointer(checkpoint / "checkpoints", keep=1, every=0)) as checkpoints:
        checkpoints.keep_base(model)
        if not checkpoints.save(0, state, {}, metadata, force=True):
            raise SavedRunError(f"{checkpoint} holds a checkpoint already; choose another folder, or delete it")
        checkpoints.wait()


def export_hf(checkpoint: Path, output: Path, dtype: Dtype | None = None) -> None:
    """Writes a checkpoint's parameters as an HF directory that transformers loads as it is.

    `checkpoint` is a run directory (its newest step), its checkpoints folder, or one step's folder; the run keeps its
    base's config, tokenizer and processor files. `dtype` of the tensors: by default what the base's config.json says.
    """
    base = Path(base_directory(checkpoint))
    config, kind = read_config(base), family_of(base).format.model
    param_dtype = jnp.dtype(load_metadata(checkpoint)["config"]["model"]["param_dtype"])
    mesh = make_mesh(MeshAxes())
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), param_dtype=param_dtype)))
    places = param_shardings(abstract, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, places
    )
    model = nnx.merge(graphdef, load_params(checkpoint, target))
    save_hf(model, output, base=base, dtype=jnp.dtype(dtype) if dtype else _named_dtype(base))


def _named_dtype(base: Path) -> jnp.dtype | None:
    """The dtype that a config.json names, in transformers' new words or its old ones; None where it names none."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for section in (config, config.get("text_config", {})):
        for key in ("dtype", "torch_dtype"):
            if section.get(key):
                return jnp.dtype(section[key])
    return None
