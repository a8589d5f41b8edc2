"""What the kernels for a GPU compute, against XLA's products in fp32: relative differences, by case.

python -m tests.models.gpu_kernels prints them as JSON; on a machine without a GPU the kernels are stood in for.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.qwen3_vl.attention import dense_attention, paged_attention
from models.qwen3_vl.cache import KVCache, unshared_table
from models.qwen3_vl.cudnn import cached_attention, cudnn_attention
from models.qwen3_vl.flash_decoding import decode_attention
from models.qwen3_vl.visibility import Visibility
from tests.models.test_ragged import HEADS, KV_HEADS, LAYERS, SIZE, config

ROWS, TOKENS, PAGE, WIDTH = 4, 256, 32, 40


def differences(*only: str) -> dict[str, float]:
    """Of all cases, or of some."""
    on_gpu = jax.default_backend() == "gpu"
    whole: Any = partial(cudnn_attention, heads_axis="heads", implementation="cudnn" if on_gpu else "xla")
    many: Any = partial(cached_attention, implementation="cudnn" if on_gpu else "xla")
    step: Any = partial(decode_attention, interpret=not on_gpu)
    ids = jnp.asarray(np.repeat([1, 2, 3, 0], [100, 50, 70, 36])[None].repeat(ROWS, 0))
    index = jnp.broadcast_to(jnp.arange(TOKENS), ids.shape)
    alone, pair, prefixes = jnp.minimum(ids, 1), jnp.minimum(ids, 2), jnp.where(ids == 3, 1, ids)
    end = WIDTH * PAGE
    cases = {
        "shared prompts": partial(of_rows, whole, Visibility(ids, prefixes, ids, index), SIZE, ids),
        "a conversation a row": partial(of_rows, whole, Visibility(alone, None, alone, index), SIZE, alone),
        "a prompt and a response": partial(of_rows, whole, Visibility(pair, alone, pair, index), SIZE, pair),
        "a conversation, no ids": partial(of_rows, whole, Visibility(query_index=index), SIZE, ids),
        "images": partial(of_rows, whole, Visibility(query_ids=ids, key_ids=ids), 72, ids),
        "prompts": partial(of_pages, many, (0, 0, 0, 0), 50),
        "observations": partial(of_pages, many, (0, 5, 700, end - 50), 50),
        "observations of short rows": partial(of_pages, many, (0, 5, 90, 17), 50),
        "a decode step": partial(of_pages, step, (0, PAGE - 1, 700, end - 1), 1),
    }
    return {name: case() for name, case in cases.items() if not only or name in only}


def of_rows(attend: Any, visibility: Visibility, size: int, ids: jax.Array) -> float:
    """Of what the tokens get, padding left out, and of the gradients; the largest."""
    random = np.random.default_rng(0)
    shapes = ((ROWS, TOKENS, HEADS, size), *[(ROWS, KV_HEADS, TOKENS, size)] * 2, (ROWS, TOKENS, HEADS, size))
    *arrays, weights = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    held = (ids > 0)[..., None, None]

    def results(attend: Any, dtype: Any) -> list[jax.Array]:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = jnp.where(held, attend(*arrays, visibility), 0).astype(jnp.float32)
            return (found * weights.astype(jnp.float32)).sum(), found

        given = [array.astype(dtype) for array in arrays]
        (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
        return [found, *gradients]

    pairs = zip(results(attend, jnp.bfloat16), results(dense_attention, jnp.float32), strict=True)
    return max(difference(*pair) for pair in pairs)


def of_pages(attend: Any, starts: Sequence[int], length: int, lanes: int = 2) -> float:
    random = np.random.default_rng(0)
    cache = KVCache.zeros(config(), pages=1 + ROWS * WIDTH // lanes, page=PAGE, lanes=lanes)
    cache = KVCache(*(jnp.asarray(random.standard_normal(each.shape), each.dtype) for each in cache))
    queries = jnp.asarray(random.standard_normal((ROWS, length, HEADS, SIZE)), jnp.bfloat16)
    index = np.asarray(starts, np.int32)[:, None] + np.arange(length, dtype=np.int32)
    given = (jnp.int32(LAYERS - 1), jnp.asarray(unshared_table(ROWS, WIDTH, lanes)), jnp.asarray(index))
    in_fp32 = jax.tree.map(lambda each: each.astype(jnp.float32), (queries, cache))
    return difference(jax.jit(attend)(queries, cache, *given), jax.jit(paged_attention)(*in_fp32, *given))


def difference(found: jax.Array, expected: jax.Array) -> float:
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


if __name__ == "__main__":
    print(json.dumps(differences()))
