"""Our side of the GPU benchmark: the programs of a run, on one device."""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hdpo_jax.algorithm.state import init_state
from hdpo_jax.algorithm.supervised import SupervisedBatch, make_sft_step
from hdpo_jax.config import OptimizerConfig, RolloutConfig
from hdpo_jax.plan.workload import Need
from hdpo_jax.rollout.engine import Extension, Running, make_programs
from hdpo_jax.rollout.packing import RowShape, assign_rows, conversation_family, fill_rows
from hdpo_jax.train.optimizer import make_optimizer
from models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from models.qwen3_vl.attention import kernel_for
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.sizes import published_config
from tests.bench.gpu_sizes import ROUNDS, Sizes

PAGE = 64


def device() -> str:
    return jax.devices()[0].device_kind


def config_of(sizes: Sizes) -> dict[str, Any]:
    """As transformers reads it."""
    return dict(sizes_of(sizes).to_hf())


def decode(sizes: Sizes) -> dict[str, float]:
    """Seconds of a prefill of all rows and of a decode step, and what each of them needs at least."""
    config, model = sizes_of(sizes), made(sizes)
    params = nnx.split(model)[1]
    rollout = RolloutConfig(
        slots=sizes.rows,
        capacity=sizes.prompt + sizes.new_tokens,
        pages=1 + sizes.rows * width(sizes),
        page=PAGE,
        chunk=sizes.new_tokens,
        force_end=False,
    )
    programs = make_programs(
        model,
        rollout,
        platform=jax.default_backend(),
        lanes=1,
        seed=0,
        stops=[[-1]],  # no token is that: every row goes on
        end_id=0,
        forbidden=np.zeros(config.text.vocab_size, np.bool_),
    )
    table = unshared_table(sizes.rows, width(sizes))
    extension, running = jax.device_put((prompts(sizes, table), slots(sizes, table)))

    prefills, decodes = [], []
    laid_out = programs.lay_out(params)
    for _ in range(1 + ROUNDS):
        cache = jax.block_until_ready(programs.empty_cache())
        seconds, (cache, _) = timed(programs.extend, params, cache, extension)
        prefills.append(seconds)
        seconds, (cache, _) = timed(programs.decode, laid_out, cache, running)
        decodes.append(seconds / sizes.new_tokens)
        del cache  # two may be more than there is room for

    need = Need(config)
    text = config.text
    cached = sizes.rows * (sizes.prompt + sizes.new_tokens / 2)
    weights = sum(leaf.size for path, leaf in nnx.to_flat_state(params) if path[0] in ("decoder", "embedding"))
    return {
        "prefill": float(np.median(prefills[1:])),
        "decode": float(np.median(decodes[1:])),
        "prefill_flops": need.tokens(sizes.rows * sizes.prompt, sizes.prompt / 2),
        "decode_bytes": 2 * (weights + cached * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim),
    }


def learn(sizes: Sizes) -> dict[str, float]:
    """Seconds of a supervised step over rows of one conversation each, one at a time, and the operations it needs."""
    config, model = sizes_of(sizes), made(sizes)
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(OptimizerConfig(moments="bfloat16", b2=0.95), 1, params)
    random, shape = np.random.default_rng(0), RowShape(sizes.learned_tokens, 0)
    tokens = random.integers(0, config.text.vocab_size // 2, (sizes.learned_rows, sizes.learned_tokens + 1), np.int32)
    learned = np.ones(sizes.learned_tokens + 1, bool)
    families = [conversation_family(row, learned, [], config) for row in tokens]
    rows = fill_rows(assign_rows(families, shape), sizes.learned_rows, shape, config)
    micro = jax.tree.map(lambda leaf: leaf.reshape(sizes.learned_rows, 1, *leaf.shape[1:]), rows)
    count: Any = np.int32(sizes.learned_rows)
    batch = jax.device_put(SupervisedBatch(micro, count))
    step, state = make_sft_step(graphdef, optimizer), init_state(params, optimizer)
    times = []
    for _ in range(1 + ROUNDS):
        seconds, (state, _) = timed(step, state, batch)
        times.append(seconds)
    need, count = Need(config), sizes.learned_rows * sizes.learned_tokens
    flops = 3 * (need.tokens(count, sizes.learned_tokens / 2) + need.logits(count))
    return {"seconds": float(np.median(times[1:])), "flops": flops}


def sizes_of(sizes: Sizes) -> Qwen3VLConfig:
    if sizes.model != "tiny":
        return published_config(sizes.model)
    whole = published_config("4B")
    text = replace(
        whole.text,
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1_024,
    )
    vision = replace(whole.vision, depth=1, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=256)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids: dict[str, Any] = {name: 1_000 + number for number, name in enumerate(names)}
    return replace(whole, text=text, vision=replace(vision, deepstack_visual_indexes=(0,)), **ids)


@functools.cache
def made(sizes: Sizes) -> Qwen3VL:
    """Random weights, all in bf16, made where they are used."""
    config, kernel = sizes_of(sizes), kernel_for(jax.devices()[0])

    @nnx.jit
    def model() -> Qwen3VL:
        return Qwen3VL(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, kernel=kernel)

    return model()


def prompts(sizes: Sizes, table: np.ndarray) -> Extension:
    shape = (sizes.rows, sizes.prompt)
    ids = np.random.default_rng(0).integers(0, 1_000, shape, np.int32)
    positions = np.broadcast_to(np.arange(sizes.prompt, dtype=np.int32)[None, :, None], (*shape, 3))
    given: list[Any] = [table, ids, positions, np.zeros(sizes.rows, np.int32), None]
    return Extension(*given)


def slots(sizes: Sizes, table: np.ndarray) -> Running:
    def each(value: int) -> np.ndarray:
        return np.full(sizes.rows, value, np.int32)

    identity = np.stack([each(0), each(0), np.arange(sizes.rows, dtype=np.int32)], axis=1)
    given: dict[str, Any] = {
        "table": table,
        "pending": each(1),
        "length": each(sizes.prompt),
        "limit": each(sizes.prompt + sizes.new_tokens),
        "offset": each(0),
        "identity": identity,
        "recent": np.zeros((sizes.rows, 0), np.int32),  # no stop sequence is longer than a token
        "active": np.ones(sizes.rows, bool),
        "shared": None,
    }
    return Running(**given)


def width(sizes: Sizes) -> int:
    """Pages of a row."""
    return -(-(sizes.prompt + sizes.new_tokens) // PAGE)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started, found
