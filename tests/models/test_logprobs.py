"""Log-probabilities in blocks are those of all logits at once, with their gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.logprobs import token_logprobs, token_logprobs_and_entropy
from sharding import make_mesh, named_sharding

FORBIDDEN = jnp.zeros(23, bool).at[jnp.array([0, 7])].set(True)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 7, 5))
    head = jax.random.normal(keys[1], (5, 23))
    return hidden, head, jax.random.randint(keys[2], (3, 7), 8, 23)


def dense(hidden, head, targets, temperature):
    logprobs = jax.nn.log_softmax(jnp.where(FORBIDDEN, -jnp.inf, hidden @ head / temperature))
    finite = jnp.where(FORBIDDEN, 0, logprobs)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * finite, axis=-1)


SOME = jnp.array([[0, 1, 1, 0, 0, 1, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize("wanted", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("block", [1, 9, 1000])
def test_values_and_gradients(arrays, block, wanted):
    hidden, head, targets = arrays

    def ours(hidden, head):
        found = token_logprobs_and_entropy(
            hidden, head, targets, temperature=0.7, forbidden=FORBIDDEN, wanted=wanted, block=block
        )
        return found.logprobs.sum() + found.entropy.sum(), found

    def expected(hidden, head):
        found = dense(hidden, head, targets, 0.7)
        if wanted is not None:
            found = tuple(jnp.where(wanted, each, 0) for each in found)
        return found[0].sum() + found[1].sum(), found

    gradients, found = jax.grad(ours, argnums=(0, 1), has_aux=True)(hidden, head)
    reference, values = jax.grad(expected, argnums=(0, 1), has_aux=True)(hidden, head)
    for ours_, theirs in zip((*found, *gradients), (*values, *reference), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=2e-6)


def test_blocks_without_a_wanted_token_are_not_computed(arrays):
    """Their hidden states are no numbers, and neither values nor gradients show it."""
    hidden, head, targets = arrays
    hidden = jnp.where(SOME[..., None], hidden, jnp.nan)

    def loss(hidden, head):
        return token_logprobs(hidden[:1], head, targets[:1], wanted=SOME[:1], block=3).sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert all(jnp.isfinite(each).all() for each in (value, *gradients))


def test_hand_computed():
    # Logits ln 1, ln 2, ln 5 with ln 5 forbidden: 1/3 and 2/3. With it, 2/8; the entropy of (1/3, 2/3) is 0.6365.
    head = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    forbidden = jnp.array([False, False, True])
    found = token_logprobs_and_entropy(jnp.ones((1, 1)), head, jnp.array([1]), forbidden=forbidden)
    np.testing.assert_allclose(found.logprobs, np.log(2 / 3), atol=1e-6)
    np.testing.assert_allclose(found.entropy, 0.6365142, atol=1e-6)
    np.testing.assert_allclose(token_logprobs(jnp.ones((1, 1)), head, jnp.array([1])), np.log(2 / 8), atol=1e-6)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_add_up_the_heads_gradient_once(axes):
    """The same numbers as on one; within a loop no device waits for what all rows say of the head, block by block."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, head = jax.random.normal(keys[0], (8, 32, 16)), jax.random.normal(keys[1], (16, 256))
    targets = jax.random.randint(keys[2], (8, 32), 0, 256)

    def loss(hidden, head):
        return token_logprobs(hidden, head, targets, block=16).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    mesh = make_mesh(axes)
    places = named_sharding(mesh, "batch", "tokens", None), named_sharding(mesh, "embed", "vocab")
    with jax.set_mesh(mesh):
        program = jax.jit(gradient, in_shardings=places, out_shardings=(None, places)).lower(hidden, head).compile()
    found = program(*jax.device_put((hidden, head), places))
    for eight, one in zip(jax.tree.leaves(found), jax.tree.leaves(jax.jit(gradient)(hidden, head)), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    text = program.as_text()
    assert text is not None
    if "tensor" in axes:
        # A block's sums over the vocabulary, at most its hidden states' gradients: 2 x 8 tokens a device, 16 wide.
        # The head's gradient would be 16 x 128.
        assert max(map(math.prod, told_in_loops(text))) == 2 * 8 * 16
    else:
        assert told_in_loops(text) == []


def told_in_loops(program: str) -> list[tuple[int, ...]]:
    """Shapes of what the bodies of a compiled program's loops tell other devices."""
    bodies = set(re.findall(r"body=(%[\w.-]+)", program))
    shapes, at = [], ""
    for line in program.splitlines():
        if line[:1] in ("%", "E"):
            at = line.split()[0]
        sent = re.search(r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)", line)
        if sent and at in bodies:
            shapes += [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", sent[1])]
    return shapes


def test_leading_axes_and_bfloat16(arrays):
    hidden, head, targets = arrays
    flat = token_logprobs(hidden[0], head, targets[0], block=4)
    stacked = token_logprobs(hidden[None], head, targets[None], block=4)
    assert flat.shape == (7,) and stacked.shape == (1, 3, 7)
    np.testing.assert_allclose(stacked[0, 0], flat, atol=1e-6)
    assert token_logprobs(hidden.astype(jnp.bfloat16), head, targets).dtype == jnp.float32


def test_logits_of_all_tokens_are_never_held(arrays):
    """The largest array of the compiled gradient is smaller than [tokens, vocabulary]."""
    hidden, targets = jnp.zeros((64, 32, 4)), jnp.zeros((64, 32), jnp.int32)
    head = jnp.zeros((4, 512))

    def loss(hidden, head):
        return token_logprobs(hidden, head, targets, block=128).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 64 * 32 * 512 * 4
