import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hdpo_jax.algorithm.state import TrainState, init_state
from hdpo_jax.algorithm.supervised import SupervisedBatch, make_sft_step
from tests.algorithm.tiny import VOCAB, TinyLM, pack_row, random_rollouts, stack_rows

OPTIMIZER = optax.sgd(1.0)
CONVERSATIONS = random_rollouts(3, prompts=6, group=1)


def fresh_state() -> tuple[nnx.GraphDef, TrainState]:
    graphdef, params = nnx.split(TinyLM(nnx.Rngs(0)))
    return graphdef, init_state(params, OPTIMIZER)


def make_batch(*, rows_each: int, micros: int, per_row: int) -> SupervisedBatch:
    rows = [
        pack_row(CONVERSATIONS[i : i + per_row], 10 * per_row, share_prompts=False)
        for i in range(0, len(CONVERSATIONS), per_row)
    ]
    stack = jax.tree.map(jnp.asarray, stack_rows(rows, micros, rows_each))
    return SupervisedBatch(rows=stack, micro_batches=jnp.int32(-(-len(rows) // rows_each)))


def unpacked_loss(graphdef: nnx.GraphDef, params: nnx.State) -> jax.Array:
    """Cross-entropy over all learned tokens, one conversation at a time."""
    total, tokens = jnp.float32(0), 0
    for conversation in CONVERSATIONS:
        row = jax.tree.map(lambda leaf: leaf[None], pack_row([conversation], 10, share_prompts=False))
        model = nnx.merge(graphdef, params)
        hidden = model.hidden_states(
            row.token_ids, positions=row.positions, segment_ids=row.segment_ids, prefix_ids=row.prefix_ids
        )
        logp = jax.nn.log_softmax(hidden @ model.head)
        chosen = jnp.take_along_axis(logp, row.targets[..., None], axis=-1)[..., 0]
        total -= jnp.where(row.loss_mask, chosen, 0).sum()
        tokens += conversation.sampled.sum()
    return total / tokens


@pytest.mark.parametrize(
    "layout",
    [{"rows_each": 1, "micros": 8, "per_row": 1}, {"rows_each": 2, "micros": 2, "per_row": 2}],
    ids=["one row a micro-batch, two empty", "packed, the last micro-batch half full"],
)
def test_the_loss_is_the_mean_over_learned_tokens(layout):
    graphdef, state = fresh_state()
    loss, grads = jax.jit(jax.value_and_grad(lambda params: unpacked_loss(graphdef, params)))(state.params)
    expected = jax.tree.map(lambda param, grad: np.asarray(param - grad), state.params, grads)
    found, metrics = make_sft_step(graphdef, OPTIMIZER)(state, make_batch(**layout))
    assert float(metrics["loss/total"]) == pytest.approx(float(loss), abs=1e-5)
    assert float(metrics["tokens/learned"]) == sum(conversation.sampled.sum() for conversation in CONVERSATIONS)
    for left, right in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_only_marked_targets_are_learned():
    graphdef, state = fresh_state()
    step = make_sft_step(graphdef, OPTIMIZER)
    batch = make_batch(rows_each=1, micros=8, per_row=1)
    scrambled = jnp.where(batch.rows.loss_mask, batch.rows.targets, (batch.rows.targets + 5) % VOCAB)
    expected, _ = step(state, batch)
    found, _ = step(fresh_state()[1], batch._replace(rows=batch.rows._replace(targets=scrambled)))
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(left, right)
