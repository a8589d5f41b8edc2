"""Memory that log-probs of given tokens take at a vocabulary of 151,936 and a width of 2,048, one device, activations
in bf16: what XLA allocates for temporaries and results, none of it an argument's (`compiled.memory_analysis()`, temp +
output - alias; nothing is run). With gradients, the head's own, as large as the head, is among the results on both
sides. Ours in blocks, against logits of all tokens at once, their `log_softmax`, and JAX's derivative of that. A CPU
multiplies bf16 in fp32, for which it holds a copy of the head that accelerators do not need.

python -m tests.bench.logprobs
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.logprobs import token_logprobs
from tests.bench.table import Row, markdown

VOCABULARY, WIDTH = 151_936, 2_048
ROW_TOKENS = 40_960
"""A packed row of the default settings."""
TARGET = ">= 8x"


def main() -> None:
    table = []
    for tokens, head in itertools.product((ROW_TOKENS, 8_192), (jnp.float32, jnp.bfloat16)):
        where = f"{tokens:,} tokens, head in {jnp.dtype(head).name} (all logits at once)"

        def measured(function: Callable[..., Any], tokens: int = tokens, head: Any = head) -> float:
            return allocated(function, tokens, WIDTH, VOCABULARY, dtype=jnp.bfloat16, head_dtype=head) / 1e9

        ours, peer = measured(token_logprobs), measured(materialised)
        table.append(Row(f"memory of log-probs, {where}", ours, peer, peer / ours, unit="GB"))
        ours, peer = measured(with_gradients(token_logprobs)), measured(with_gradients(materialised))
        target = TARGET if tokens == ROW_TOKENS else None
        table.append(Row(f"memory of log-probs and their gradients, {where}", ours, peer, peer / ours, target, "GB"))
    print(markdown(table))


def materialised(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """What anyone would write first: [tokens, vocabulary] in fp32."""
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def with_gradients(logprobs: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The sum of the log-probs, and its gradients by hidden states and head."""
    return jax.value_and_grad(lambda hidden, head, targets: logprobs(hidden, head, targets).sum(), argnums=(0, 1))


def allocated(
    function: Callable[..., Any], tokens: int, width: int, vocabulary: int, *, dtype: Any, head_dtype: Any
) -> int:
    """Bytes beside the arguments that `function(hidden, head, targets)` takes on one row of `tokens`."""
    hidden = jax.ShapeDtypeStruct((1, tokens, width), dtype)
    head = jax.ShapeDtypeStruct((width, vocabulary), head_dtype)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    memory = jax.jit(function).lower(hidden, head, targets).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


if __name__ == "__main__":
    main()
