"""The programs of a run with arguments that have shapes and places but no values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from hdpo_jax.algorithm.state import abstract_state, state_shardings
from hdpo_jax.algorithm.supervised import SupervisedBatch, make_sft_step
from hdpo_jax.algorithm.update import UpdateBatch, make_update
from hdpo_jax.config import RLConfig
from hdpo_jax.rollout.engine import make_programs
from hdpo_jax.rollout.lockstep import Lanes
from hdpo_jax.rollout.packing import RowShape, fill_rows
from hdpo_jax.rollout.scheduler import Scheduler
from hdpo_jax.train.optimizer import make_optimizer
from models.qwen3_vl import GATHERED, Qwen3VL, Qwen3VLConfig
from models.qwen3_vl.attention import kernel_for
from sharding import RULES, make_mesh, param_shardings, spec

TOOL_CALL_END = 5
"""Tokens of the sequence that ends a tool call, about: the decode program remembers as many."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted function and what it is to be compiled for."""

    function: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run's model on its mesh, abstract."""

    config: RLConfig
    sizes: Qwen3VLConfig
    mesh: Mesh

    @classmethod
    def of(cls, config: RLConfig, sizes: Qwen3VLConfig, devices: Any) -> "Setting":
        return cls(config=config, sizes=sizes, mesh=make_mesh(config.mesh, devices))

    def shards(self, logical_axis: str) -> int:
        """Parts that a logical axis is split in."""
        return math.prod(self.mesh.shape[axis] for axis in RULES.mesh_axes(logical_axis))

    def extension(self, name: str) -> tuple[int, int, int]:
        """Rows on all devices, tokens and patches of what `prefill` and `append` compute at a time."""
        rows, tokens, patches = self.config.rollout.shapes[_shape_of(self.config, name)]
        lanes = self.shards("slots")
        return lanes * max(1, rows // lanes), tokens, patches

    def model(self) -> tuple[Qwen3VL, nnx.GraphDef, Any]:
        """The model without values, its structure, and its parameters with their places."""
        settings = self.config.model
        model = nnx.eval_shape(
            lambda: Qwen3VL(
                self.sizes,
                rngs=nnx.Rngs(0),
                dtype=jnp.dtype(settings.dtype),
                param_dtype=jnp.dtype(settings.param_dtype),
                remat=settings.remat,
                kernel=kernel_for(self.mesh.devices.flat[0]),
            )
        )
        graphdef, params = nnx.split(model)
        places = param_shardings(params, self.mesh)
        return model, graphdef, jax.tree.map(_placed, params, places)


def rollout_programs(setting: Setting) -> Mapping[str, Program]:
    """The programs that sample: one for each size of what is computed at a time, and the decode step."""
    config, mesh = setting.config.rollout, setting.mesh
    model, _, params = setting.model()
    lanes = Lanes.of(mesh).count
    programs = make_programs(
        model,
        config,
        platform=mesh.devices.flat[0].platform,
        lanes=lanes,
        seed=0,
        stops=[[0] * TOOL_CALL_END],
        end_id=0,
        forbidden=np.zeros(setting.sizes.text.vocab_size, np.bool_),
    )
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(programs.empty_cache)
    cache = jax.tree.map(lambda leaf: _abstract(leaf.shape, leaf.dtype, mesh, cache.AXES), cache)
    scheduler = Scheduler(config.share(1, lanes), setting.sizes, lanes=1, recent=TOOL_CALL_END - 1)
    everything = scheduler.empty_round()

    def of_all_lanes(arrays: Any) -> Any:
        def of_leaf(array: Any) -> jax.ShapeDtypeStruct:
            return _abstract((array.shape[0] * lanes, *array.shape[1:]), array.dtype, mesh, ("slots",))

        return jax.tree.map(of_leaf, arrays)

    extensions = {name: everything.extensions[_shape_of(setting.config, name)] for name in ("prefill", "append")}
    # Shapes alone say nothing of places. Decoding reads none of the vision tower, wherever that is.
    laid_out = jax.eval_shape(programs.lay_out, params)
    rules = GATHERED if config.parameters == "gathered" else RULES
    laid_out = jax.tree.map(_placed, laid_out, param_shardings(laid_out, mesh, rules))
    return {
        **{
            name: Program(function=programs.extend, arguments=(params, cache, of_all_lanes(extension)))
            for name, extension in extensions.items()
        },
        "decode": Program(function=programs.decode, arguments=(laid_out, cache, of_all_lanes(everything.running))),
    }


def learning_programs(setting: Setting) -> Mapping[str, Program]:
    """The update of a step, and a supervised step over as many rows."""
    config, mesh, train = setting.config, setting.mesh, setting.config.train
    _, graphdef, params = setting.model()
    optimizer = make_optimizer(config.optimizer, train.steps * train.mini_batches, params)
    state = abstract_state(params, optimizer)
    shardings = state_shardings(state)
    update = make_update(
        graphdef,
        optimizer,
        config.algorithm,
        temperature=config.rollout.temperature,
        forbidden=np.zeros(setting.sizes.text.vocab_size, np.bool_),
        shardings=shardings,
    )
    shape, dtype = RowShape(train.row_tokens, train.row_patches), jnp.dtype(config.model.dtype)
    row = fill_rows([], 1, shape, setting.sizes, patch_dtype=dtype, experts=config.rollout.replay_experts)
    micro = -(-train.max_rows // train.micro_batch_rows)

    def rows(*leading: int) -> Any:
        names = (None,) * (len(leading) - 1) + ("batch", "tokens")
        return jax.tree.map(lambda leaf: _abstract((*leading, *leaf.shape[1:]), leaf.dtype, mesh, names), row)

    per_rollout = (train.prompts_per_step, train.group_size)
    numbers, flags = (_abstract(per_rollout, dtype, mesh, ()) for dtype in (np.float32, np.bool_))
    counts: tuple[Any, ...] = (_abstract((train.mini_batches,), np.int32, mesh, ()), *[numbers] * 3, *[flags] * 2)
    count: Any = _abstract((), np.int32, mesh, ())
    batch = UpdateBatch(rows(train.mini_batches, micro, train.micro_batch_rows), *counts)
    supervised = SupervisedBatch(rows(micro, train.micro_batch_rows)._replace(experts=None), count)
    step = make_sft_step(graphdef, optimizer, shardings=shardings)
    return {
        "update": Program(function=update, arguments=(state, batch)),
        "sft_step": Program(function=step, arguments=(state, supervised)),
    }


def _shape_of(config: RLConfig, name: str) -> int:
    """Of the sizes computed at a time: the largest for a prompt; what holds the longest observation with images."""
    shapes = config.rollout.shapes
    if name == "prefill":
        return max(range(len(shapes)), key=lambda shape: shapes[shape][1:])
    wanted = min(config.agent.max_observation_tokens, max(tokens for _, tokens, _ in shapes))
    return next(number for number, (_, tokens, patches) in enumerate(shapes) if tokens >= wanted and patches)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _abstract(shape: tuple[int, ...], dtype: Any, mesh: Mesh, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    """`names` are of the first dimensions; the others are split over nothing."""
    names = (*names, *[None] * (len(shape) - len(names)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(RULES, names, mesh, shape)))
