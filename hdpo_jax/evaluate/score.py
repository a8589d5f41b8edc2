"""`hdpo score`: what probability a model gives to every token of given conversations."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress

from hdpo_jax.config import Dtype, ModelConfig
from hdpo_jax.evaluate.messages import encode_given, power_of_two, read_conversations
from hdpo_jax.files import replacing
from hdpo_jax.train.policy import load_policy
from models.families import read_processor
from models.logprobs import token_logprobs
from models.policy import PolicyConfig
from models.qwen3_vl import PackedImages
from models.qwen3_vl.images import feature_indices, mrope_positions, pack_images, placeholder_ids
from models.qwen3_vl.processing import EncodedPrompt
from sharding import MeshAxes, shard_batch

ROWS = 8
"""Conversations of about one length that are computed at a time."""
LEAST_TOKENS, LEAST_PATCHES = 64, 256
"""The smallest static sizes of a row; larger ones double, so that a file of any lengths compiles few programs."""


class ScoreRows(NamedTuple):
    """Conversations padded to one length; a padding row is all zeros."""

    token_ids: Int[Array, "rows tokens"]
    targets: Int[Array, "rows tokens"]
    """The token after each; 0 after the last."""
    positions: Int[Array, "rows tokens 3"]
    segment_ids: Int[Array, "rows tokens"]
    images: PackedImages | None


def score_file(
    model: Path,
    messages: Path,
    output: Path,
    *,
    add_generation_prompt: bool = False,
    dtype: Dtype = "bfloat16",
) -> None:
    """Writes an npz with `token_ids_i` int32 [T] and `logprobs_i` fp32 [T] for the i-th conversation of `messages`.

    Entry t of `logprobs_i` is log p(token t | the tokens before it) at temperature 1; entry 0 is NaN. Raises
    MessagesError, which names the line, for what is no conversation or does not fit the model's template.
    """
    conversations = read_conversations(messages)
    processor = read_processor(model)
    policy = load_policy(ModelConfig(path=str(model), dtype=dtype, param_dtype=dtype), MeshAxes())
    rows = min(ROWS, len(conversations))
    # One at a time: the patches of all images of a file may not fit the host's memory.
    encoded = (
        (index, encode_given(processor, given, add_generation_prompt=add_generation_prompt))
        for index, given in enumerate(conversations)
    )
    arrays: dict[str, np.ndarray] = {}
    with jax.set_mesh(policy.mesh), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("score", total=len(conversations))
        for (tokens, patches), batch in _batches(encoded, rows):
            prompts = [prompt for _, prompt in batch]
            packed = pack_rows(processor.config, prompts, rows=rows, tokens=tokens, patches=patches)
            scored = np.asarray(next_logprobs(policy.graphdef, policy.params, shard_batch(packed, policy.mesh)))
            for (index, prompt), row in zip(batch, scored, strict=False):  # the last rows may be padding
                arrays[f"token_ids_{index}"] = prompt.token_ids.astype(np.int32)
                following = row[: len(prompt.token_ids) - 1]
                arrays[f"logprobs_{index}"] = np.concatenate([[np.nan], following]).astype(np.float32)
            progress.advance(task, len(batch))
    with replacing(output) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: arrays[name] for name in sorted(arrays, key=_by_number)})


@partial(jax.jit, static_argnames="graphdef")
def next_logprobs(graphdef: nnx.GraphDef, params: nnx.State, rows: ScoreRows) -> Float[Array, "rows tokens"]:
    """log p(target | the token and all before it)."""
    model = nnx.merge(graphdef, params)
    hidden = model.hidden_states(
        rows.token_ids, positions=rows.positions, segment_ids=rows.segment_ids, images=rows.images
    )
    return token_logprobs(hidden, model.head, rows.targets)


def pack_rows(
    config: PolicyConfig, prompts: Sequence[EncodedPrompt], *, rows: int, tokens: int, patches: int
) -> ScoreRows:
    """One prompt a row, in NumPy arrays of the given static sizes; 0 patches: rows without images."""
    packed = ScoreRows(
        token_ids=_blank(rows, tokens),
        targets=_blank(rows, tokens),
        positions=_blank(rows, tokens, 3),
        segment_ids=_blank(rows, tokens),
        images=None,
    )
    features = np.full((rows, tokens), -1, np.int32)
    for row, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        grids = [image.grid for image in prompt.images]
        packed.token_ids[row, :length] = prompt.token_ids
        packed.targets[row, : length - 1] = prompt.token_ids[1:]
        packed.positions[row, :length], _ = mrope_positions(prompt.token_ids, grids, config)
        packed.segment_ids[row, :length] = 1
        features[row, :length] = feature_indices(prompt.token_ids, *placeholder_ids(config))
    if not patches:
        return packed
    images = [prompt.images for prompt in prompts] + [()] * (rows - len(prompts))
    return packed._replace(images=pack_images(config, images, features, patches))


def _blank(*shape: int) -> Any:
    """A NumPy array to fill, in the place of the device array that it becomes."""
    return np.zeros(shape, np.int32)


def _batches(
    encoded: Iterable[tuple[int, EncodedPrompt]], rows: int
) -> Iterator[tuple[tuple[int, int], list[tuple[int, EncodedPrompt]]]]:
    """Conversations of one static size together, up to `rows` of them."""
    waiting: dict[tuple[int, int], list[tuple[int, EncodedPrompt]]] = defaultdict(list)
    for index, prompt in encoded:
        patches = sum(len(image.patches) for image in prompt.images)
        size = power_of_two(len(prompt.token_ids), LEAST_TOKENS), power_of_two(patches, LEAST_PATCHES) if patches else 0
        waiting[size].append((index, prompt))
        if len(waiting[size]) == rows:
            yield size, waiting.pop(size)
    yield from waiting.items()


def _by_number(name: str) -> tuple[int, str]:
    return int(name.rpartition("_")[2]), name
