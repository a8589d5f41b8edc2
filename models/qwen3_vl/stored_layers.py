"""Decoder layers and their experts as checkpoints have them: numbered in files, stacked in the model."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from models.qwen3_vl.config import MoEConfig, TextConfig
from models.qwen3_vl.stored import CheckpointError, StoredTensor

ExpertLayout = Literal["hub", "transformers"]
"""hub: [experts, inputs, outputs]. transformers: [experts, outputs, inputs], from version 5 on, which reads both."""


class StoredLayer(NamedTuple):
    """A layer of the decoder."""

    name: str
    """What the names of its tensors begin with."""
    path: tuple[str | int, ...]
    """Where its stack is in the model's state."""
    index: int
    """Which of the stack it is."""
    moe: MoEConfig | None


def stored_layers(text: TextConfig) -> Iterator[StoredLayer]:
    runs = text.layer_runs
    for run_number, run in enumerate(runs):
        path = ("decoder", "layers") if len(runs) == 1 else ("decoder", "layers", "stacks", run_number)
        for index, number in enumerate(run.layers):
            yield StoredLayer(f"model.language_model.layers.{number}", path, index, run.moe)


def expert_shapes(text: TextConfig, moe: MoEConfig, layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors of experts, by the end of their names."""
    width, hidden, experts = text.hidden_size, moe.moe_intermediate_size, moe.num_experts
    inputs_outputs = {"gate_up_proj": (width, 2 * hidden), "down_proj": (hidden, width)}
    return {name: (experts, *(sides if layout == "hub" else reversed(sides))) for name, sides in inputs_outputs.items()}


def expert_layout(text: TextConfig, stored: Mapping[str, StoredTensor]) -> ExpertLayout | None:
    """The layout of a checkpoint's experts, told by their shapes; None where there are none of these shapes.

    One of the two tensors may be square, never both: that would take a width of h and of 2 h hidden units. Raises
    CheckpointError where the tensors do not agree.
    """
    found: dict[ExpertLayout, str] = {}
    for layer in stored_layers(text):
        if layer.moe is None:
            continue
        shapes = {layout: expert_shapes(text, layer.moe, layout) for layout in get_args(ExpertLayout)}
        for end in shapes["hub"]:
            name = f"{layer.name}.mlp.experts.{end}"
            fitting = [layout for layout in shapes if name in stored and stored[name].shape == shapes[layout][end]]
            if len(fitting) == 1:
                found.setdefault(fitting[0], name)
    if len(found) > 1:
        raise CheckpointError(
            f"{found['hub']} is stored as on the hub, {found['transformers']} as by transformers 5; expected one layout"
        )
    return next(iter(found), None)


def layout_to_save(text: TextConfig, base: Mapping[str, StoredTensor]) -> ExpertLayout:
    """That of the base, unless transformers would not know it again: of a square tensor it believes that it is its own.

    Servers that read checkpoints without transformers know the layout of the hub only.
    """
    moe = text.moe
    if moe is None or text.hidden_size in (moe.moe_intermediate_size, 2 * moe.moe_intermediate_size):
        return "transformers"
    return expert_layout(text, base) or "transformers"


def read_layer_by_layer(
    read: Callable[[int, Any], np.ndarray], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    """A stacked parameter of which the host holds one layer at a time: the experts are most of a model.

    `read` gives a part of a layer: its number, and the slices of its dimensions.
    """
    of_layer = NamedSharding(sharding.mesh, P(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else sharding

    @partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(stack: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return stack.at[number].set(layer)

    stack = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    for number in range(shape[0]):
        layer = jax.make_array_from_callback(shape[1:], of_layer, partial(read, number))
        # Waited for: else the host would go on reading, and hold what is not yet on its way.
        stack = jax.block_until_ready(put(stack, layer, jnp.int32(number)))
    return stack
