import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hdpo_jax.algorithm.accumulation import Tally, accumulate
from hdpo_jax.algorithm.advantages import channel_advantages
from hdpo_jax.algorithm.losses import hdpo_loss, importance_weights
from hdpo_jax.algorithm.state import TrainState, init_state, state_shardings
from hdpo_jax.algorithm.update import UpdateBatch, make_update
from hdpo_jax.config import AlgorithmConfig
from hdpo_jax.types import PackedRows
from sharding import make_mesh, param_shardings, replicate, shard_batch
from tests.algorithm.tiny import VOCAB, Rollout, TinyLM, pack_row, random_rollouts, stack_rows

PROMPTS, GROUP = 4, 4
TEMPERATURE = 0.7
FORBIDDEN = np.arange(VOCAB) == VOCAB - 1
# Plain steps and a large rate: Adam's sign-like first step would hide wrong scales, a small rate wrong old log-probs.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(2.0, momentum=0.9))
HDPO = AlgorithmConfig(w_tool=0.5)


def fresh_state(optimizer: optax.GradientTransformation = OPTIMIZER) -> tuple[nnx.GraphDef, TrainState]:
    graphdef, params = nnx.split(TinyLM(nnx.Rngs(0)))
    return graphdef, init_state(params, optimizer)


def rewards(seed: int = 0) -> dict[str, jax.Array]:
    """Random calls and correctness; the last rollout is dropped and its rewards are unknown."""
    rng = np.random.default_rng(seed + 100)
    calls = rng.integers(0, 3, (PROMPTS, GROUP)).astype(np.float32)
    correct = rng.random((PROMPTS, GROUP)) < 0.7
    usable = np.ones((PROMPTS, GROUP), bool)
    usable[-1, -1] = False
    accuracy = np.where(usable, 0.9 * correct + 0.1, np.nan)
    tool = np.where(usable, correct / (calls + 1), np.nan)
    arrays = {"accuracy_rewards": accuracy, "tool_rewards": tool, "calls": calls}
    floats = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return {**floats, "correct": jnp.asarray(correct & usable), "usable": jnp.asarray(usable)}


def make_batch(
    *, seed: int = 0, minis: int = 2, rows_each: int = 2, micros: int = 8, per_row: int = 1, share_prompts: bool = False
) -> UpdateBatch:
    """Rollouts in row order, `per_row` of them in each row; micro-batches that are not needed stay empty."""
    rollouts = random_rollouts(seed, PROMPTS, GROUP)
    share = len(rollouts) // minis
    stacks, used = [], []
    for mini in range(minis):
        mine = rollouts[mini * share : (mini + 1) * share]
        rows = [
            pack_row(mine[i : i + per_row], 10 * per_row, share_prompts=share_prompts) for i in range(0, share, per_row)
        ]
        stacks.append(stack_rows(rows, micros, rows_each))
        used.append(-(-len(rows) // rows_each))
    rows = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *stacks)
    return UpdateBatch(rows=rows, micro_batches=jnp.array(used, jnp.int32), **rewards(seed))


def log_probs(graphdef: nnx.GraphDef, params: nnx.State, rows: PackedRows) -> jax.Array:
    """Of each row's targets, the plain way."""
    model = nnx.merge(graphdef, params)
    hidden = model.hidden_states(
        rows.token_ids, positions=rows.positions, segment_ids=rows.segment_ids, prefix_ids=rows.prefix_ids
    )
    logits = jnp.where(FORBIDDEN, -jnp.inf, hidden @ model.head / TEMPERATURE)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], axis=-1)[..., 0]


@functools.cache
def unpacked_update(algorithm: AlgorithmConfig, *, seed: int, minis: int) -> TrainState:
    """The first step the plain way: one rollout a row, whole mini-batches, no loops, `hdpo_loss` as published."""
    graphdef, state = fresh_state()
    rollouts = random_rollouts(seed, PROMPTS, GROUP)
    found = channel_advantages(algorithm, **rewards(seed))
    acc, tool, tool_rollouts = found.acc.ravel(), found.tool.ravel(), found.tool_rollouts.ravel()
    usable = np.asarray(rewards(seed)["usable"]).ravel()

    def alone(rollout: Rollout) -> PackedRows:
        return pack_row([rollout], 10, share_prompts=False)

    rows = jax.tree.map(lambda *leaves: np.stack(leaves), *map(alone, rollouts))
    old = jax.jit(log_probs)(graphdef, state.params, rows)
    params, opt_state = state.params, state.opt_state
    share = len(rollouts) // minis
    for mini in range(minis):
        at = slice(mini * share, (mini + 1) * share)

        def loss(params: nnx.State, at: slice = at) -> jax.Array:
            mine = jax.tree.map(lambda leaf: leaf[at], rows)
            mask = mine.loss_mask & usable[at, None]
            settings = {name: getattr(algorithm, name) for name in ("w_acc", "w_tool", "clip_low", "clip_high")}
            settings["tool_rollouts"] = tool_rollouts[at]
            if algorithm.importance_cap:
                settings["importance"] = importance_weights(old[at], mine.sampled_logprobs, algorithm.importance_cap)
            value, _ = hdpo_loss(log_probs(graphdef, params, mine), old[at], acc[at], tool[at], mask, **settings)
            return value

        updates, opt_state = OPTIMIZER.update(jax.jit(jax.grad(loss))(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return TrainState(params, opt_state, state.step + 1)


def assert_close(found: Any, expected: Any, atol: float = 2e-5) -> None:
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=atol)


def assert_same_bits(found: Any, expected: Any) -> None:
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the programs that XLA compiles meanwhile."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def update() -> Any:
    graphdef, _ = fresh_state()
    return make_update(graphdef, OPTIMIZER, HDPO, temperature=TEMPERATURE, forbidden=FORBIDDEN)


LAYOUTS = {
    "one row a micro-batch": {"rows_each": 1},
    "all rows at once": {"rows_each": 8, "micros": 1},
    "packed, and two empty micro-batches": {"rows_each": 2, "micros": 4, "per_row": 2},
    "behind shared prompts, in uneven rows": {"rows_each": 1, "per_row": 3, "share_prompts": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_and_micro_batches_never_change_the_step(update, layout):
    """Means of micro-batch means, weighted by size or not, would differ between all of these."""
    _, state = fresh_state()
    expected = unpacked_update(HDPO, seed=0, minis=2)
    found, metrics = update(state, make_batch(**LAYOUTS[layout]))
    assert_close(found, expected)
    assert int(found.step) == 1 and float(metrics["optimizer/skipped"]) == 0
    assert float(metrics["policy/ratio_mean"]) != pytest.approx(1.0, abs=1e-3)  # the second mini-batch is off-policy


@pytest.mark.parametrize(
    "settings",
    [
        {"tool_mean_over": "qualifying", "w_tool": 0.5},
        {"tool_mean_over": "all", "w_tool": 0.5, "clip_low": 0.01, "clip_high": 0.02},
        {"advantages": "coupled_calls"},
    ],
)
def test_settings_reach_the_loss(settings):
    algorithm = AlgorithmConfig(**settings)
    graphdef, state = fresh_state()
    expected = unpacked_update(algorithm, seed=1, minis=1)
    step = make_update(graphdef, OPTIMIZER, algorithm, temperature=TEMPERATURE, forbidden=FORBIDDEN)
    found, metrics = step(state, make_batch(seed=1, minis=1, rows_each=4, micros=4))
    assert_close(found, expected)
    # One mini-batch starts from the parameters that sampled: the ratio is 1 without a pass for old log-probs.
    assert float(metrics["policy/ratio_mean"]) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["policy/clip_share"]) == 0.0


@pytest.mark.parametrize("layout", ["one row a micro-batch", "behind shared prompts, in uneven rows"])
def test_packing_never_changes_a_step_with_importance_weights(layout):
    """The second mini-batch's weights too are of the log-probs before the step, not of those after the first."""
    algorithm = AlgorithmConfig(w_tool=0.5, importance_cap=1.05)
    graphdef, state = fresh_state()
    step = make_update(graphdef, OPTIMIZER, algorithm, temperature=TEMPERATURE, forbidden=FORBIDDEN)
    found, metrics = step(state, make_batch(**LAYOUTS[layout]))
    assert_close(found, unpacked_update(algorithm, seed=0, minis=2))
    assert 0 < float(metrics["policy/importance_cap_share"]) < 0.9
    assert 0 < float(metrics["policy/importance_mean"]) < 1.05
    with pytest.raises(AssertionError):
        assert_close(found, unpacked_update(HDPO, seed=0, minis=2))


def test_what_the_policy_itself_sampled_has_importance_1():
    graphdef, state = fresh_state()
    batch = make_batch(minis=1, rows_each=4, micros=4)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), batch.rows)
    sampled = batch.rows._replace(
        sampled_logprobs=log_probs(graphdef, state.params, flat).reshape(batch.rows.logprobs.shape)
    )
    (found, metrics), (expected, plain) = (
        make_update(graphdef, OPTIMIZER, algorithm, temperature=TEMPERATURE, forbidden=FORBIDDEN)(
            fresh_state()[1], batch._replace(rows=sampled)
        )
        for algorithm in (AlgorithmConfig(w_tool=0.5, importance_cap=2.0), HDPO)
    )
    assert float(metrics["policy/importance_mean"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["policy/importance_cap_share"]) == 0.0
    assert_close(found, expected)
    assert not any(name.startswith("policy/importance") for name in plain)


def test_without_a_cap_the_samplers_log_probs_are_not_looked_at(update):
    batch = make_batch(rows_each=1)
    unknown = batch.rows._replace(sampled_logprobs=jnp.full_like(batch.rows.logprobs, jnp.nan))
    found, _ = update(fresh_state()[1], batch._replace(rows=unknown))
    expected, _ = update(fresh_state()[1], batch)
    assert_same_bits(found, expected)


def test_a_step_is_one_program_and_compiles_once(update):
    _, state = fresh_state()
    batches = [make_batch(seed=seed, per_row=seed, rows_each=1) for seed in (1, 1)]
    other = batches[1]._replace(micro_batches=batches[1].micro_batches - 1)
    jax.block_until_ready((state, batches))
    jax.clear_caches()  # whatever else a step ran would have to be compiled again
    with compilations() as first:
        state, _ = update(state, batches[0])
    with compilations() as second:
        state, _ = update(state, other)
    assert first == ["jit(update)"] or len(first) == 1, first
    assert second == []


def test_the_old_state_is_donated(update):
    _, state = fresh_state()
    before = jax.tree.leaves(state.params)
    update(state, make_batch(rows_each=1))
    assert all(leaf.is_deleted() for leaf in before)


def test_what_was_not_sampled_is_not_learned(update):
    """Other observation and prompt *targets* change nothing: the loss has no gradient through predicting them."""
    batch = make_batch(rows_each=1)
    scrambled = jnp.where(batch.rows.loss_mask, batch.rows.targets, (batch.rows.targets + 5) % VOCAB)
    found, _ = update(fresh_state()[1], batch._replace(rows=batch.rows._replace(targets=scrambled)))
    expected, _ = update(fresh_state()[1], batch)
    assert_same_bits(found, expected)


def test_dropped_rollouts_are_not_learned(update):
    """As if they had never been sampled: neither their tokens nor their rewards count, in no mean."""
    batch = make_batch(rows_each=1)
    dropped = batch.rows.loss_mask & ~batch.usable.ravel()[batch.rows.rollout]
    assert int(dropped.sum()) > 0
    absent = batch._replace(
        rows=batch.rows._replace(loss_mask=batch.rows.loss_mask & ~dropped),
        accuracy_rewards=jnp.nan_to_num(batch.accuracy_rewards, nan=1.0),
    )
    found, metrics = update(fresh_state()[1], absent)
    expected, _ = update(fresh_state()[1], batch)
    assert_same_bits(found, expected)
    assert all(np.isfinite(float(value)) for value in metrics.values())


def test_equal_rewards_change_nothing():
    graphdef, state = fresh_state()
    step = make_update(graphdef, OPTIMIZER, HDPO, temperature=TEMPERATURE, forbidden=FORBIDDEN)
    batch = make_batch(minis=1, rows_each=4, micros=4)
    ones = jnp.ones((PROMPTS, GROUP))
    batch = batch._replace(accuracy_rewards=0.7 * ones, tool_rewards=ones / 3, calls=ones, correct=ones > 0)
    found, metrics = step(state, batch)
    assert_same_bits(found.params, fresh_state()[1].params)
    assert float(metrics["loss/total"]) == 0.0 and float(metrics["tool/nonzero_share"]) == 0.0
    assert float(metrics["tool/qualifying_share"]) == 1.0


def test_forward_passes_are_those_that_are_needed():
    """Micro-batches in use, once; and before the step those of the second mini-batch again, for old log-probs."""
    passes: list[None] = []

    class CountingLM(TinyLM):
        def hidden_states(self, input_ids, **inputs):
            jax.debug.callback(lambda: passes.append(None))
            return super().hidden_states(input_ids, **inputs)

    graphdef, params = nnx.split(CountingLM(nnx.Rngs(0)))
    step = make_update(graphdef, OPTIMIZER, HDPO, temperature=TEMPERATURE, forbidden=FORBIDDEN)
    batch = make_batch(rows_each=3, micros=6, per_row=2)
    assert batch.micro_batches.tolist() == [2, 2]
    jax.block_until_ready(step(init_state(params, OPTIMIZER), batch))
    jax.effects_barrier()
    assert len(passes) == 2 + 2 + 2  # with the empty ones 6 + 6 + 6; old log-probs of the first mini-batch too: 8


def test_a_gradient_that_is_not_finite_skips_its_step(update):
    graphdef, state = fresh_state()
    # A token that only the second mini-batch holds gets a broken embedding.
    batch = make_batch(rows_each=1)
    ids = jnp.where(batch.rows.token_ids == 7, 6, batch.rows.token_ids)
    ids = ids.at[1, 0, 0, 0].set(7)
    embedding = state.params["embedding"][...].at[7].set(jnp.nan)
    state.params["embedding"].set_value(jax.device_put(embedding, state.step.sharding))
    batch = batch._replace(rows=batch.rows._replace(token_ids=ids))
    found, metrics = update(state, batch)
    assert float(metrics["optimizer/skipped"]) == 1.0
    assert int(found.step) == 1
    others = [np.asarray(found.params[name][...]) for name in ("mix", "output")]
    assert all(np.isfinite(array).all() for array in others)
    start = fresh_state()[1].params
    assert not np.allclose(others[0], np.asarray(start["mix"][...]))  # the first mini-batch's step was taken


def test_metrics(update):
    batch = make_batch(rows_each=1)
    _, metrics = update(fresh_state()[1], batch)
    usable = np.asarray(batch.usable)
    found = channel_advantages(HDPO, **rewards())
    nonzero, qualifying = np.asarray(found.tool) != 0, np.asarray(found.qualifying)
    assert float(metrics["tool/nonzero_share"]) == pytest.approx(nonzero.sum() / usable.sum())
    assert float(metrics["tool/qualifying_share"]) == pytest.approx(qualifying.sum() / usable.sum())
    assert 0 < float(metrics["policy/entropy"]) < np.log(VOCAB)
    assert 0 < float(metrics["policy/logprob_gap_mean"]) < float(metrics["policy/logprob_gap_max"])
    assert float(metrics["loss/total"]) == pytest.approx(
        float(metrics["loss/acc"] + HDPO.w_tool * metrics["loss/tool"]), abs=1e-6
    )


def test_eight_devices_take_the_same_step():
    """Parameters over fsdp and tensor, rows over data and fsdp; the new state lies where the old one did."""
    graphdef, state = fresh_state()
    expected = unpacked_update(HDPO, seed=0, minis=2)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        params = jax.device_put(state.params, param_shardings(state.params, mesh))
        spread = init_state(params, OPTIMIZER)
        shardings = state_shardings(spread)
        step = make_update(graphdef, OPTIMIZER, HDPO, temperature=TEMPERATURE, forbidden=FORBIDDEN, shardings=shardings)
        host = jax.device_get(make_batch(rows_each=4, micros=3))
        batch = UpdateBatch(
            *[
                shard_batch(part, mesh, axis=2) if name == "rows" else replicate(part, mesh)
                for name, part in host._asdict().items()
            ]
        )
        assert batch.rows.token_ids.sharding.shard_shape(batch.rows.token_ids.shape)[2] == 1
        found, _ = step(spread, batch)
        assert_close(found, expected)
        assert state_shardings(found) == shardings
        with compilations() as again:
            step(found, batch)
        assert again == []


def test_accumulation_never_computes_what_lies_outside():
    """Micro-batches outside [start, stop) may hold anything."""
    params = {"w": jnp.array([2.0, 3.0], jnp.bfloat16)}
    micro_batches = {"x": jnp.array([[jnp.nan] * 2, [1.0, 2.0], [3.0, 4.0], [jnp.inf] * 2])}

    def loss(params, micro):
        value = (params["w"].astype(jnp.float32) * micro["x"]).sum()
        return value, Tally(sums={"value": value}, maxima={"largest": micro["x"].max()})

    program = jax.jit(lambda start, stop: accumulate(loss, params, micro_batches, start=start, stop=stop))
    tally, grads = program(1, 3)
    assert float(tally.sums["value"]) == 8.0 + 18.0 and float(tally.maxima["largest"]) == 4.0
    assert grads["w"].dtype == jnp.float32 and grads["w"].tolist() == [4.0, 6.0]
    tally, grads = program(2, 2)
    assert float(tally.sums["value"]) == 0.0 and grads["w"].tolist() == [0.0, 0.0]


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    """300 ones are 300. In bfloat16 256 + 1 = 256: they would add up to 256."""

    def loss(params, micro):
        value = (params["w"] * micro["x"]).sum()
        return value.astype(jnp.float32), Tally(sums={}, maxima={})

    params, micro_batches = {"w": jnp.ones(2, jnp.bfloat16)}, {"x": jnp.ones((300, 2), jnp.bfloat16)}
    _, grads = jax.jit(lambda: accumulate(loss, params, micro_batches, start=0, stop=300))()
    assert grads["w"].dtype == jnp.float32 and grads["w"].tolist() == [300.0, 300.0]


def test_greedy_sampling_can_not_be_learned_from():
    with pytest.raises(ValueError, match="temperature is 0"):
        make_update(fresh_state()[0], OPTIMIZER, HDPO, temperature=0.0)
