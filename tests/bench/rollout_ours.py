"""Our side of the rollout benchmark, and what it shares with the plain loop: policy, tools, prompts."""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hdpo_jax.config import AgentConfig, ModelConfig, RolloutConfig
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train.policy import Policy, load_policy
from hdpo_jax.types import Observation, Prompt, ToolCall, Trajectory
from models.qwen3_vl.processing import Processor
from sharding.mesh import MeshAxes
from tests.bench.chat_model import make_prompts, write_chat_model
from tests.bench.rollout_sizes import (
    FIXED,
    GROUP,
    GROUP_PAGE,
    INPUTS,
    LARGE,
    MAX_CALLS,
    MIXED,
    OBSERVATION,
    TOOL_SECONDS,
    TURN_TOKENS,
    WAITING,
    Sizes,
)


class SlowTools:
    """A toolbox that takes its time, and says the same to every call."""

    workers = 64

    def session(self, images: Sequence[bytes]) -> "SlowTools":
        return self

    def call(self, call: ToolCall) -> Observation:
        time.sleep(TOOL_SECONDS)
        return Observation(text=OBSERVATION)

    def close(self) -> None:
        pass


def prepare(directory: Path) -> None:
    """The model, and what transformers is to continue, as arrays: its process is to hold what it needs, no more."""
    write_chat_model(directory, longest_edge=GROUP.image_side)
    processor = Processor.from_hf(directory)
    encode = PromptEncoder(processor, RolloutConfig())
    asked = make_prompts(processor, FIXED.prompts, FIXED.prompt_tokens, FIXED.image_side)
    questions = [encode(prompt) for prompt in asked for _ in range(FIXED.samples)]
    ids, images = np.stack([one.token_ids for one in questions]), [image for one in questions for image in one.images]
    np.savez(
        directory / INPUTS,
        input_ids=ids.astype(np.int64),
        attention_mask=np.ones_like(ids, np.int64),
        pixel_values=np.concatenate([image.patches for image in images]),
        image_grid_thw=np.array([image.grid for image in images], np.int64),
        mm_token_type_ids=(ids == processor.config.image_token_id).astype(np.int32),
    )


@functools.cache
def policy(directory: str, stops: bool) -> Policy:
    """The model; with `stops` every token is a few dozen to one that ends the turn, else none does."""
    loaded = load_policy(ModelConfig(path=directory, dtype="float32", remat="nothing"), MeshAxes())
    processor = loaded.processor
    forbidden = processor.forbidden.copy()
    if stops:
        ends = [processor.stop_ids[0], *processor.tool_call_end]
        letters = np.flatnonzero(~forbidden)[: len(ends) * TURN_TOKENS - len(ends)]
        forbidden[:] = True
        forbidden[[*letters, *ends]] = False
    else:
        forbidden[list(processor.stop_ids)] = True
    processor.forbidden = forbidden
    return loaded


@functools.cache
def prompts(directory: str, sizes: Sizes) -> list[Prompt]:
    return make_prompts(policy(directory, False).processor, sizes.prompts, sizes.prompt_tokens, sizes.image_side)


def agent(sizes: Sizes) -> AgentConfig:
    return AgentConfig(max_calls=MAX_CALLS, max_response_tokens=sizes.new_tokens, max_observation_tokens=64)


def rollout_config(sizes: Sizes) -> RolloutConfig:
    return RolloutConfig(
        slots=sizes.rows,
        in_flight=4 * sizes.rows,
        capacity=sizes.capacity,
        patches=sizes.patches,
        page=64,
        chunk=32,
        return_early=0.1,
        shapes=(
            *((rows, 64, 0) for rows in (1, 4)),
            *((rows, sizes.prompt_tokens, sizes.patches) for rows in (1, 4)),
        ),
    )


@functools.cache
def sampler(directory: str, sizes: Sizes, config: RolloutConfig, tools: bool) -> Sampler:
    """Compiled."""
    loaded, toolbox = policy(directory, tools), SlowTools() if tools else None
    made = loaded.sampler(cast(ToolBox | None, toolbox), agent=agent(sizes), rollout=config, seed=0)
    made.warm_up(loaded.params)
    return made


def run(directory: str, sizes: Sizes, *, tools: bool = False, **changes: Any) -> dict[str, Any]:
    """One batch: seconds, tokens, and what the sampler counted."""
    ours = sampler(directory, sizes, replace(rollout_config(sizes), **changes), tools)
    params, asked = policy(directory, tools).params, prompts(directory, sizes)
    started = time.perf_counter()
    found = ours.sample(params, asked, samples=sizes.samples, step=0)
    return {
        "seconds": time.perf_counter() - started,
        "prefill_seconds": ours.stats.extend_seconds,
        "decode_seconds": ours.stats.decode_seconds,
        "decode_steps": ours.stats.decode_steps,
        "chunks": ours.stats.chunks,
        "token_ids": [one.token_ids.tolist() for one in found],
    }


def fixed(directory: str) -> dict[str, Any]:
    return run(directory, FIXED, chunk=64)


def mixed(directory: str) -> dict[str, Any]:
    return run(directory, MIXED, tools=True)


def least_seconds(directory: str) -> float:
    """Of `fixed`, if the decoder's products were all there is to do and went at the rate of a large one."""
    model: Any = policy(directory, False).model
    of_layers = sum(array.size for array in jax.tree.leaves(nnx.state(model.decoder)))
    rollouts = FIXED.prompts * FIXED.samples
    sampled, prompted = rollouts * FIXED.new_tokens, FIXED.prompts * FIXED.prompt_tokens
    needed = of_layers * (prompted + sampled) + model.head.size * sampled
    product, square = jax.jit(jnp.matmul), jnp.ones((LARGE, LARGE))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(product(square, square))
        seconds.append(time.perf_counter() - started)
    return needed * min(seconds) / LARGE**3


def group_of_one_prompt(directory: str) -> dict[str, float]:
    """For a group, and for as many prompts of one rollout each: prompt tokens computed, bytes of the smallest cache
    in which nothing is evicted, and seconds of a decode step."""
    # A chunk shorter than a rollout: all of them are there at once, the unshared too.
    config = replace(rollout_config(GROUP), page=GROUP_PAGE, chunk=4, shapes=((1, 2_048, GROUP.patches),))
    asked, params = prompts(directory, GROUP), policy(directory, False).params
    found = {}
    for name, batch, samples in (("", asked, GROUP.samples), ("unshared_", asked * GROUP.samples, 1)):
        roomy = sampler(directory, GROUP, config, False)
        roomy.sample(params, batch, samples=samples, step=0)
        ours = sampler(directory, GROUP, replace(config, pages=roomy.stats.peak_pages), False)
        for _ in range(2):  # the second time: nothing is new to the machine
            ours.sample(params, batch, samples=samples, step=0)
        assert not ours.stats.evictions
        found[f"{name}tokens"] = ours.stats.computed_tokens
        found[f"{name}bytes"] = sum(array.nbytes for array in ours.programs.empty_cache())
        found[f"{name}step"] = ours.stats.decode_seconds / ours.stats.decode_steps
    return found


def chunk_overhead(directory: str) -> float:
    """Seconds that the host takes for a chunk, with every slot running: planning it, and starting its program."""
    ours = sampler(directory, FIXED, replace(rollout_config(FIXED), chunk=1), False)
    programs, launched = ours.programs, 0.0

    def decode(*arguments: Any) -> Any:
        nonlocal launched
        started = time.perf_counter()
        report = programs.decode(*arguments)
        launched += time.perf_counter() - started
        return report

    ours.programs = replace(programs, decode=decode)
    found = run(directory, FIXED, chunk=1)
    ours.programs = programs
    planned = found["seconds"] - found["prefill_seconds"] - found["decode_seconds"]
    return (planned + launched) / found["chunks"]


def many_waiting(directory: str) -> dict[str, float]:
    """Share of the decode steps' slots that are used, as long as there are as many rollouts as slots, and to the end;
    and the share of the time until then in which slots decode or something is computed for them."""
    ours = sampler(directory, WAITING, rollout_config(WAITING), True)
    counted: list[tuple[int, int, float, float]] = []
    started = time.perf_counter()

    def count(_: Trajectory) -> None:
        now, stats = time.perf_counter() - started, ours.stats
        counted.append((stats.sampled_tokens, stats.slot_steps, stats.decode_seconds + stats.extend_seconds, now))

    ours.sample(
        policy(directory, True).params,
        prompts(directory, WAITING),
        samples=WAITING.samples,
        step=0,
        on_finished=count,
    )
    tokens, steps, busy, seconds = counted[-WAITING.rows - 1]
    return {"while_waiting": tokens / steps, "busy": busy / seconds, "whole": ours.stats.occupancy}
