"""The benchmark's figures at a size that compiles in a moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.logprobs import token_logprobs
from tests.bench.logprobs import allocated, materialised, with_gradients


@pytest.mark.parametrize("head", [jnp.float32, jnp.bfloat16])
def test_gradients_take_an_eighth_of_what_all_logits_take(head):
    sizes = {"tokens": 8_192, "width": 64, "vocabulary": 4_096}
    ours, peer = (
        allocated(with_gradients(logprobs), **sizes, dtype=jnp.bfloat16, head_dtype=head)
        for logprobs in (token_logprobs, materialised)
    )
    assert peer > 8_192 * 4_096 * 4
    assert ours <= peer / 8


def test_the_peer_computes_the_same():
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, head = jax.random.normal(keys[0], (1, 9, 4)), jax.random.normal(keys[1], (4, 30))
    inputs = hidden, head, jnp.arange(9)[None]
    for ours, peer in zip(
        jax.tree.leaves(with_gradients(token_logprobs)(*inputs)),
        jax.tree.leaves(with_gradients(materialised)(*inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, peer, atol=1e-5)
