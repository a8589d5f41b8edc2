"""The experts that tokens went through when they were sampled: recorded, packed, and gone through by the learner."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hdpo_jax.algorithm.forward import row_states
from hdpo_jax.config import ConfigError, DataConfig, ModelConfig, RLConfig, RolloutConfig
from hdpo_jax.rollout.packing import RowShape, assign_rows, fill_rows, group_family
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.policy import Policy
from hdpo_jax.types import PackedRows
from models.qwen3_vl import KVCache, MoEConfig, Qwen3VL, Qwen3VLConfig, TextConfig
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.images import mrope_positions, pack_images
from models.qwen3_vl.layers import Precision
from models.qwen3_vl.moe import SparseMLP
from sharding import make_mesh, param_shardings, shard_batch
from tests.rollout.chatty import AGENT, ROLLOUT, chatty_policy
from tests.rollout.iterations import PROMPTS, TRAIN, Setting, fused, host_driven
from tests.rollout.test_agent import Camera, assert_same
from tests.updates import assert_learned_the_same

RECORDING = replace(ROLLOUT, replay_experts=True, shapes=((4, 64, 64),))
EXPERTS, CHOSEN = 8, 3


def with_experts(policy: Policy) -> Policy:
    """Of the same size, with experts in every second layer; random weights, the same on any mesh."""
    sizes: Any = policy.model.config
    moe = MoEConfig(num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=16, decoder_sparse_step=2)
    config: Qwen3VLConfig = replace(sizes, text=replace(sizes.text, moe=moe, initializer_range=0.1))
    model = Qwen3VL(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat="nothing")
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, param_shardings(params, policy.mesh))
    model = nnx.merge(graphdef, params)
    return replace(policy, model=model, graphdef=graphdef, params=params)


@pytest.fixture(scope="module")
def mixture(policy) -> Policy:
    return with_experts(policy)


def sample(policy, prompts, latency=0.0, samples=2, **changes):
    rollout: RolloutConfig = replace(RECORDING, **changes)
    toolbox: Any = Camera(latency=latency)
    sampler = Sampler(policy.model, policy.processor, toolbox, mesh=policy.mesh, agent=AGENT, rollout=rollout, seed=3)
    return sampler.sample(policy.params, prompts, samples=samples, step=5)


@pytest.fixture(scope="module")
def reference(task, mixture):
    return sample(mixture, task.prompts[:4])


def all_experts(trajectory) -> np.ndarray:
    return np.concatenate([trajectory.prompt_experts, trajectory.experts])


def chosen(policy, trajectories) -> list[np.ndarray]:
    """What the router chooses for all tokens but the last, each trajectory read in one go."""
    config, rows, width = policy.model.config, len(trajectories), -(-ROLLOUT.capacity // 16)
    token_ids, features = np.zeros((rows, ROLLOUT.capacity), np.int32), np.full((rows, ROLLOUT.capacity), -1, np.int32)
    positions = np.zeros((*token_ids.shape, 3), np.int32)
    for row, one in enumerate(trajectories):
        ids = one.token_ids
        places = np.flatnonzero(ids == config.image_token_id)
        token_ids[row, : len(ids)], features[row, places] = ids, np.arange(len(places))
        positions[row, : len(ids)], _ = mrope_positions(ids, [image.grid for image in one.images], config)
    images = pack_images(config, [list(one.images) for one in trajectories], features, 160)
    cache = KVCache.zeros(config, pages=1 + rows * width, page=16, dtype=jnp.float32)

    @jax.jit
    def read(params, images):
        model, start = nnx.merge(policy.graphdef, params), jnp.zeros(rows, jnp.int32)
        table = jnp.asarray(unshared_table(rows, width))
        _, _, experts = model.extend(
            token_ids, positions=jnp.asarray(positions), cache=cache, table=table, start=start, images=images
        )
        return experts

    experts = np.asarray(read(policy.params, images))
    return [row[: len(one.token_ids) - 1] for row, one in zip(experts, trajectories, strict=True)]


def test_a_trajectory_knows_the_experts_of_every_token_but_the_last(mixture, reference):
    """Of prompts, sampled tokens and observations: what one pass over all of it chooses."""
    assert sum(one.calls for one in reference) > 5 and any(len(one.images) > one.prompt_images for one in reference)
    layers = mixture.model.config.text.num_hidden_layers
    for one, expected in zip(reference, chosen(mixture, reference), strict=True):
        assert one.experts.dtype == np.uint8
        assert one.experts.shape == (len(one.token_ids) - one.prompt_length, layers, CHOSEN)
        np.testing.assert_array_equal(np.sort(all_experts(one)), np.sort(expected))
    used = np.concatenate([all_experts(one) for one in reference])
    first, second = reference[:2]
    assert first.prompt_experts is second.prompt_experts  # one array for all that go on from a prompt
    assert not used[:, ::2].any()  # layers without any
    assert len(np.unique(used[:, 1::2])) == EXPERTS


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 2, "chunk": 3},
        {"shapes": ((2, 16, 64),)},  # prompts and observations in parts
        {"pages": ROLLOUT.pages_a_row + 1},  # the fewest there can be: trajectories are evicted and computed anew
    ],
    ids=str,
)
def test_scheduling_does_not_change_them(task, mixture, reference, changes):
    assert_recorded_the_same(sample(mixture, task.prompts[:4], latency=0.02, **changes), reference)


@pytest.mark.slow
def test_eight_devices_record_what_one_does(task, reference):
    policy = with_experts(chatty_policy(task, devices=8))
    assert_recorded_the_same(sample(policy, task.prompts[:4], slots=8), reference)


def assert_recorded_the_same(found, expected):
    assert_same(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(all_experts(ours), all_experts(theirs))


def packed(policy, trajectories, *, experts: bool, tokens: int = 320) -> PackedRows:
    config, shape = policy.model.config, RowShape(tokens, 256)
    groups = [trajectories[first : first + 2] for first in range(0, len(trajectories), 2)]
    families = [group_family(group, 2 * index, config) for index, group in enumerate(groups)]
    return fill_rows(assign_rows(families, shape), 4, shape, config, experts=experts)


def test_the_learner_goes_through_them_whatever_its_router_would_choose(mixture, reference):
    """With the sampler's own router nothing changes; with another, all do what the sampler's did."""
    free, replayed = (packed(mixture, reference, experts=experts) for experts in (False, True))
    assert free.experts is None and replayed.experts is not None
    held = free.segment_ids > 0

    run = jax.jit(lambda params, rows: row_states(mixture.graphdef, params, rows)[0])

    def states(params, rows):
        return np.asarray(run(params, rows))[held]

    np.testing.assert_allclose(states(mixture.params, replayed), states(mixture.params, free), atol=1e-4)
    flat = nnx.to_flat_state(mixture.params)
    turned = [(path, leaf.replace(leaf[...][..., ::-1]) if path[-1] == "router" else leaf) for path, leaf in flat]
    other = nnx.from_flat_state(turned)
    assert np.abs(states(other, replayed) - states(other, free)).max() > 0.1
    # Of experts that stand in the opposite order, the same are chosen by the opposite numbers.
    opposite = replayed._replace(experts=EXPERTS - 1 - replayed.experts)
    np.testing.assert_allclose(states(other, opposite), states(other, free), atol=1e-4)


def test_padding_takes_nobody_s_place_where_a_device_has_fewer_experts_than_a_token_chooses(mixture, reference):
    """Three rows are on all of four devices, which keep their two experts and look at every token."""
    rows = packed(mixture, reference, experts=True, tokens=1_200)
    rows = jax.tree.map(lambda leaf: leaf[:3], rows)
    held = rows.segment_ids > 0
    assert 0.1 < held.mean() < 0.4  # padding that all went to one expert would fill a device
    run = jax.jit(lambda params, rows: row_states(mixture.graphdef, params, rows)[0])
    expected = np.asarray(run(mixture.params, rows))[held]
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(mixture.params, param_shardings(mixture.params, mesh))
        found = np.asarray(run(placed, shard_batch(rows, mesh)))[held]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_rows_of_a_run_say_their_experts_where_that_is_asked_for(mixture):
    for replays in (False, True):
        data = {"model": ModelConfig(path="unused"), "data": DataConfig(path="unused"), "output": "unused"}
        config = RLConfig(rollout=replace(ROLLOUT, replay_experts=replays), train=TRAIN, **data)
        rows, _ = RowBatcher.of(config, mixture.model.config, np.float32)([[]])
        assert (rows.experts is not None) == replays


def test_shares_are_the_router_s_own_and_it_learns():
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=4)
    precision = Precision(jnp.float32, jnp.float32)
    mlp = SparseMLP(TextConfig(hidden_size=4, moe=moe), moe, precision=precision, rngs=nnx.Rngs(0))
    mlp.router[...] = jnp.diag(jnp.log(jnp.asarray([1.0, 2.0, 3.0, 4.0])))
    x = jnp.ones((1, 1, 4))  # the logits are log 1 to log 4
    choice, share = mlp.route(x, jnp.asarray([[[2, 0]]], jnp.uint8))
    np.testing.assert_array_equal(choice, [[[2, 0]]])
    np.testing.assert_allclose(share, [[[3 / 4, 1 / 4]]], rtol=1e-6)
    np.testing.assert_array_equal(mlp.route(x)[0], [[[3, 2]]])
    _, unlikely = mlp.route(-1_000 * x, jnp.asarray([[[2, 3]]], jnp.uint8))
    np.testing.assert_allclose(unlikely.sum(), 1)  # where both have all but no share of the whole
    graphdef, params = nnx.split(mlp)
    slope = jax.grad(lambda params: nnx.merge(graphdef, params).route(x, choice)[1][0, 0, 0])(params)
    # Of a share p among two: p (1 - p) by its own logit, the opposite by the other's, nothing by those left out.
    np.testing.assert_allclose(slope["router"][...][0], [-3 / 16, 0, 3 / 16, 0], atol=1e-6)


@pytest.mark.slow
def test_an_iteration_learns_through_them_in_either_way(task, mixture):
    """Host-driven, and as one program on two devices: the same experts, and the same state."""
    prompts = task.prompts[:PROMPTS]
    settings = {"replay_experts": True, "slots": 8, "shapes": RECORDING.shapes}
    expected_state, expected, _ = host_driven(Setting(mixture, Camera(), **settings), prompts, steps=1)
    halves = with_experts(chatty_policy(task, devices=2))
    state, found, _ = fused(Setting(halves, Camera(), **settings), prompts, steps=1)
    assert_recorded_the_same(found, expected)
    learned = (state.params, expected_state.params, mixture.params)
    assert_learned_the_same(*map(jax.tree.leaves, learned))


def test_a_model_without_experts_has_none_to_replay(task, policy):
    with pytest.raises(ConfigError, match="rollout.replay_experts is on, and the model has no experts"):
        sample(policy, task.prompts[:1])
