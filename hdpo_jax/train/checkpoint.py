"""Checkpoints of a run: all it needs to go on, or to be exported; one folder a step, written whole or not at all."""

import fnmatch
import json
import signal
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from hdpo_jax.algorithm.state import TrainState
from sharding.multihost import barrier, gather, is_lead

BASE = "base"
"""Folder of a run that holds what an export needs beside the parameters."""
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json", "*.pt", "*.pth", "*.gguf", "*.h5")

Json = Mapping[str, Any]


class SavedRunError(ValueError):
    """A checkpoint is missing, or is not of this model; the message says what was found and what was expected."""


class Checkpointer:
    """Saves and restores a run's state in `directory` (the run's `checkpoints` folder), on every process alike."""

    def __init__(self, directory: epath.PathLike, keep: int, every: int):
        """Keeps the newest `keep` checkpoints; `save` writes steps that `every` divides (0: only those forced)."""
        self._every = every
        self.directory = epath.Path(directory).absolute() if "://" not in str(directory) else epath.Path(directory)
        # Ours alone: what a killed run left half-written is removed, and never counted as a checkpoint.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, data_state: Json, metadata: Json, *, force: bool = False) -> bool:
        """Writes a checkpoint in the background if one is due (or `force`d); False where none was.

        Returns once the arrays are copied to the host: the state may be donated right after. `data_state` is this
        process's own data iterator state; `metadata` says what the run is. Both are JSON.
        """
        due = force or (self._every > 0 and step % self._every == 0)
        if not due or step in self._manager.all_steps():
            return False
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(_named(state.params)),
            optimizer=ocp.args.StandardSave(_named((state.opt_state, state.step))),
            data=ocp.args.JsonSave({"processes": gather(data_state)}),
            metadata=ocp.args.JsonSave(dict(metadata)),
        )
        return self._manager.save(step, args=items, force=True)

    def restore_latest(self, abstract_state: TrainState) -> tuple[int, TrainState, Sequence[Json]] | None:
        """The newest checkpoint's (step, state, the data states of all that saved it); None where there is none.

        `abstract_state` gives shapes, dtypes and shardings; the mesh, and the number of processes, may be others than
        at the time of saving. Raises SavedRunError where the checkpoint holds another model or optimizer.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        optimizer = (abstract_state.opt_state, abstract_state.step)
        folder = self.directory / str(step)
        params_target = _matching(folder / "params", abstract_state.params)
        optimizer_target = _matching(folder / "optimizer", optimizer)
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(params_target),
            optimizer=ocp.args.StandardRestore(optimizer_target),
            data=ocp.args.JsonRestore(),
        )
        items = self._manager.restore(step, args=wanted)
        params = _unnamed(items["params"], abstract_state.params)
        opt_state, state_step = _unnamed(items["optimizer"], optimizer)
        return step, TrainState(params, opt_state, state_step), items["data"]["processes"]

    def keep_base(self, hf_directory: epath.PathLike) -> epath.Path:
        """Copies config, tokenizer and processor files (all but weights) beside the checkpoints, once a run."""
        target = self.directory.parent / BASE
        if is_lead() and not target.exists():
            unfinished = self.directory.parent / f"{BASE}.unfinished"
            if unfinished.exists():
                unfinished.rmtree()
            unfinished.mkdir(parents=True)
            for file in epath.Path(hf_directory).iterdir():
                if file.is_file() and not any(fnmatch.fnmatch(file.name, pattern) for pattern in WEIGHTS):
                    file.copy(unfinished / file.name)
            unfinished.rename(target)
        barrier("keep_base")
        return target

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then lets go of the folder."""
        self._manager.close()


def find_checkpoint(directory: epath.PathLike) -> epath.Path:
    """The step folder meant by a run directory or its checkpoints folder (the newest step), or by a step folder."""
    given = epath.Path(directory)
    for folder in (given, given / "checkpoints"):
        if (folder / "params").is_dir():
            return folder.absolute()
        if folder.is_dir() and (steps := ocp.utils.checkpoint_steps(folder)):
            return (folder / str(max(steps))).absolute()
    found = "nothing" if not given.exists() else "no checkpoint" if given.is_dir() else "a file"
    raise SavedRunError(
        f"{directory} holds {found}; expected a run directory, its checkpoints folder, or one step's folder in there"
    )


def base_directory(directory: epath.PathLike) -> epath.Path:
    """The folder with the config, tokenizer and processor files that the run of a checkpoint kept."""
    base = find_checkpoint(directory).parent.parent / BASE
    if not base.is_dir():
        raise SavedRunError(f"{base} is missing; expected the config and tokenizer files that a run keeps there")
    return base


def load_params(directory: epath.PathLike, abstract_params: PyTree) -> PyTree:
    """Only the parameters of a checkpoint (see `find_checkpoint`), shaped and laid out as `abstract_params`."""
    folder = find_checkpoint(directory) / "params"
    target = _matching(folder, abstract_params)
    with ocp.StandardCheckpointer() as reader:
        return _unnamed(reader.restore(folder, target), abstract_params)


def load_metadata(directory: epath.PathLike) -> Json:
    """What `save` was told of the run."""
    return json.loads((find_checkpoint(directory) / "metadata" / "metadata").read_text())


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag while it is entered; a second SIGINT interrupts at once.

    `with StopSignal() as stop: … if stop.requested: save and leave`. Main thread only; the old handlers come back.
    """

    def __init__(self):
        self.number = 0
        """The signal that came; 0: none."""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.number = number


def _named(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path: what is on disk depends on no library's containers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def _unnamed(named: Mapping[str, Any], like: PyTree) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in _named(like)])


def _matching(folder: epath.Path, tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """What to restore; SavedRunError where the checkpoint's arrays have other names, shapes or dtypes."""
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in _named(tree).items()
    }
    found = ocp.StandardCheckpointHandler().metadata(folder).tree
    expected = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in target.items()}
    saved = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in found.items()}
    different = sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
    if different:
        name = different[0]
        shapes, saved_shapes = ({name: array[0] for name, array in each.items()} for each in (expected, saved))
        dtypes_only = saved_shapes == shapes
        other = "another model.param_dtype or optimizer.moments" if dtypes_only else "another model or optimizer"
        raise SavedRunError(
            f"{folder} holds {_describe(saved.get(name))} for {name}; expected {_describe(expected.get(name))} "
            f"({len(different)} arrays differ): the run was saved with {other}"
        )
    return target


def _describe(array: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if array is None else f"{array[1]}{list(array[0])}"
