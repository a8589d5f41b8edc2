"""The kernels for a GPU against XLA's products: on one where there is one, and everywhere with stand-ins."""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models.qwen3_vl import Qwen3VL, cudnn, flash_decoding
from models.qwen3_vl.attention import attention, kernel_for, paged_attention
from models.qwen3_vl.cache import KVCache, unshared_table
from models.qwen3_vl.visibility import Visibility
from sharding import make_mesh
from tests.bench.gpu_ours import sizes_of
from tests.bench.gpu_sizes import SIZES
from tests.models import gpu_kernels
from tests.models.test_ragged import HEADS, SIZE, config

LARGEST = 0.01
"""Relative, where what is given and what is found are bf16."""


@pytest.mark.slow
def test_they_compute_what_the_products_do():
    """Masks, pages and sums; cuDNN's own part is XLA's here, and the Triton kernel is interpreted."""
    found = gpu_kernels.differences()
    assert len(found) == 9
    assert max(found.values()) < LARGEST, found


PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@pytest.mark.skipif(
    not Path("/dev/nvidia0").exists() or not any(map(importlib.util.find_spec, PLUGINS)),
    reason="no NVIDIA GPU, or no JAX for one",
)
def test_they_compute_it_on_a_gpu():
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "tests.models.gpu_kernels"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    differences = json.loads(found.stdout.splitlines()[-1])
    print(differences)
    assert max(differences.values()) < LARGEST, differences


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "cases"),
    [
        ({"fsdp": 2, "tensor": 2}, ["shared prompts", "observations", "a decode step"]),
        ({"fsdp": 2, "context": 2}, ["shared prompts"]),
    ],
    ids=["rows and heads split", "rows and tokens split"],
)
def test_devices_compute_their_own(axes, cases):
    with jax.set_mesh(make_mesh(axes, jax.devices()[:4])):
        found = gpu_kernels.differences(*cases)
    assert list(found) == cases
    assert max(found.values()) < LARGEST, found


def test_the_decode_kernel_lowers_for_a_gpu():
    """Without one: what Triton is given is made here."""
    cache = KVCache.zeros(config(), pages=9, page=16)
    given = (jnp.zeros((2, 1, HEADS, SIZE), jnp.bfloat16), cache, jnp.int32(1), jnp.asarray(unshared_table(2, 4)))
    traced = jax.jit(flash_decoding.decode_attention).trace(*given, jnp.zeros((2, 1), jnp.int32))
    assert "decode_attention" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("capability", "kernel"), [("8.0", "cudnn"), ("9.0", "cudnn"), ("12.0", "cudnn"), ("7.5", "xla"), ("gfx942", "xla")]
)
def test_gpus_that_have_no_such_kernels_compute_by_xla(capability, kernel):
    assert kernel_for(SimpleNamespace(platform="gpu", compute_capability=capability)) == kernel


def test_a_model_for_a_gpu_reads_prompts_and_decodes_by_them(monkeypatch):
    """The same numbers as XLA's, and each kernel is asked for its part."""
    asked = []

    def counted(name: str, kernel: Any) -> Any:
        return lambda *arguments: asked.append(name) or kernel(*arguments)

    cached = functools.partial(cudnn.cached_attention, implementation="xla")
    decode = functools.partial(flash_decoding.decode_attention, interpret=True)
    monkeypatch.setattr(cudnn, "cached_attention", counted("prompt", cached))
    monkeypatch.setattr(flash_decoding, "decode_attention", counted("step", decode))
    sizes, found = sizes_of(SIZES["tiny"]), {}
    for kernel in ("xla", "cudnn"):
        graphdef, params = nnx.split(nnx.jit(lambda kernel=kernel: Qwen3VL(sizes, rngs=nnx.Rngs(0), kernel=kernel))())
        extend = jax.jit(lambda params, ids, graphdef=graphdef, **more: nnx.merge(graphdef, params).extend(ids, **more))
        cache, hidden = KVCache.zeros(sizes, pages=9, page=16), []
        for start, length in ((0, 20), (20, 9), (29, 1)):
            positions = jnp.broadcast_to(start + jnp.arange(length)[:, None], (2, length, 3))
            states, cache, _ = extend(
                params,
                jnp.arange(2 * length).reshape(2, length),
                positions=positions,
                cache=cache,
                table=jnp.asarray(unshared_table(2, 4)),
                start=jnp.full(2, start),
            )
            hidden.append(states.astype(jnp.float32))
        found[kernel] = jnp.concatenate(hidden, axis=1)
    assert sorted(set(asked)) == ["prompt", "step"]
    assert gpu_kernels.difference(found["cudnn"], found["xla"]) < 2 * LARGEST


def test_a_gpu_gets_them_where_they_take_rows_and_heads(caplog):
    """And XLA computes the others: one line each, however often."""
    cache = KVCache.zeros(config(), pages=9, page=16, dtype=jnp.float32)
    table, index = jnp.asarray(unshared_table(2, 4)), jnp.arange(6).reshape(2, 3)
    queries = jnp.ones((2, 3, HEADS, SIZE))
    rows = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 2, 3, 8)), jnp.ones((1, 2, 3, 8))
    causal = Visibility(query_index=jnp.arange(3)[None])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            paged_attention(queries, cache, jnp.int32(0), table, index, kernel="cudnn")
            paged_attention(queries[:, :1], cache, jnp.int32(0), table, index[:, :1], kernel="cudnn")
            attention(*rows, causal, kernel="cudnn")
    assert [record.message.split("; ")[-1] for record in caplog.records] == [
        "computed without cuDNN",
        "decoding without the kernel for a GPU",
        "computed without cuDNN",
    ]
    assert cudnn.takes(2, 4, 72, jnp.bfloat16)
    assert not cudnn.takes(2, 4, 136, jnp.bfloat16)
    assert [flash_decoding.stages(128, page) for page in (64, 128, 256)] == [3, 1, 0]
