"""The step on the real model and the real packing, with images in prompts and observations."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from hdpo_jax.algorithm.state import TrainState, init_state
from hdpo_jax.algorithm.update import UpdateBatch, make_update
from hdpo_jax.config import AlgorithmConfig
from hdpo_jax.data.tiny_checkpoint import TINY
from hdpo_jax.rollout.packing import RowShape, assign_rows, fill_rows, group_family
from hdpo_jax.types import PackedRows, Prompt, StopReason, Trajectory
from models.qwen3_vl import EncodedImage, MoEConfig, Qwen3VL, Qwen3VLConfig
from sharding import make_mesh, param_shardings, shard_batch

PROMPT = Prompt(id="p", messages=(), images=(), ground_truth="", data_source="test")
# Experts, an MLP, experts.
EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=(1,))
TINY_MOE = replace(TINY, text=replace(TINY.text, moe=EXPERTS))
IMAGE = TINY.image_token_id
OPTIMIZER = optax.sgd(1.0)
GROUPS, SAMPLES = 2, 3


def image(rng: np.random.Generator, rows: int, columns: int) -> EncodedImage:
    patches = rng.normal(size=(rows * columns, TINY.vision.patch_dim)).astype(np.float32)
    return EncodedImage(patches=patches, grid=(1, rows, columns))


def random_trajectories() -> list[Trajectory]:
    """Two groups whose prompts hold images of other shapes; the second sample of each saw a tool's image."""
    rng = np.random.default_rng(0)
    trajectories = []
    for group in range(GROUPS):
        picture = image(rng, 2 + 2 * group, 4)
        prompt = [11, *[IMAGE] * (picture.patches.shape[0] // 4), *rng.integers(20, 90, 3 + group)]
        for sample in range(SAMPLES):
            ids, images = [*prompt, *rng.integers(20, 90, 3 + sample)], [picture]
            sampled = [False] * len(prompt) + [True] * (3 + sample)
            if sample == 1:
                images.append(image(rng, 2, 2))
                ids += [12, IMAGE, 13, *rng.integers(20, 90, 2)]
                sampled += [False] * 3 + [True] * 2
            trajectories.append(
                Trajectory(
                    prompt=PROMPT,
                    group=group,
                    sample=sample,
                    token_ids=np.asarray(ids, np.int32),
                    sampled=np.asarray(sampled),
                    logprobs=np.where(sampled, -4.0, 0.0).astype(np.float32),
                    sampled_logprobs=np.where(sampled, -4.0, 0.0).astype(np.float32),
                    prompt_length=len(prompt),
                    images=images,
                    prompt_images=1,
                    turns=(),
                    calls=int(sample == 1),
                    stop=StopReason.END_OF_TURN,
                )
            )
    return trajectories


def packed(shape: RowShape, rows_each: int, sharing: int) -> tuple[PackedRows, int]:
    """`sharing` rollouts stand behind one copy of their prompt."""
    trajectories = random_trajectories()
    families = [
        group_family(trajectories[first : first + sharing], trajectories[first].group * SAMPLES, TINY)
        for first in range(0, len(trajectories), sharing)
    ]
    assigned = assign_rows(families, shape)
    micros = -(-len(assigned) // rows_each)
    rows = fill_rows(assigned, micros * rows_each, shape, TINY)
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(1, micros, rows_each, *leaf.shape[1:]), rows)
    return stacked, len(assigned)


def gradient_step(
    shape: RowShape, rows_each: int, sharing: int, *, config: Qwen3VLConfig = TINY, mesh: Mesh | None = None
) -> tuple[int, Sequence[np.ndarray], dict[str, float]]:
    """Rows used, what one plain gradient step added to each parameter, and the metrics."""
    graphdef, params = nnx.split(Qwen3VL(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    before = jax.device_get(jax.tree.leaves(params))
    if mesh is not None:
        params = jax.device_put(params, param_shardings(params, mesh))
    state: TrainState = init_state(params, OPTIMIZER)
    rows, used = packed(shape, rows_each, sharing)
    accuracy = jnp.array([[1.0, 0.1, 1.0], [1.0, 1.0, 0.0]])
    batch = UpdateBatch(
        rows=rows if mesh is None else shard_batch(rows, mesh, axis=2),
        micro_batches=jnp.array([-(-used // rows_each)], jnp.int32),
        accuracy_rewards=accuracy,
        tool_rewards=jnp.array([[1.0, 0.0, 0.5], [1.0, 0.5, 0.0]]),
        calls=jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]),
        correct=accuracy == 1.0,
        usable=jnp.ones((GROUPS, SAMPLES), bool),
    )
    forbidden: Any = np.isin(np.arange(TINY.text.vocab_size), [IMAGE])
    update = make_update(graphdef, OPTIMIZER, AlgorithmConfig(), temperature=0.8, forbidden=forbidden)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        state, metrics = update(state, batch)
    after = jax.device_get(jax.tree.leaves(state.params))
    steps = [new - old for new, old in zip(after, before, strict=True)]
    return used, steps, {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (TINY, None),
        (TINY, {"fsdp": 2, "tensor": 2, "context": 2}),
        (TINY_MOE, {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=["dense", "dense, rows split over devices", "MoE, 8 devices"],
)
def test_rows_that_share_prompts_and_images_give_the_unpacked_gradient(config, axes):
    """Each prompt and its image once, both groups in one micro-batch, against every rollout with a copy of its own.

    The latter on one device.
    """
    mesh = None if axes is None else make_mesh(axes)
    used, found, metrics = gradient_step(RowShape(32, 48), rows_each=2, sharing=SAMPLES, config=config, mesh=mesh)
    assert used == 2
    used, expected, alone = gradient_step(RowShape(17, 20), rows_each=1, sharing=1, config=config)
    assert used >= 4
    largest = max(np.abs(step).max() for step in expected)
    assert largest > 1e-3 and all(np.abs(step).max() > 0 for step in expected)  # the vision tower learns too
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4 * largest)
    for name, value in alone.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name
