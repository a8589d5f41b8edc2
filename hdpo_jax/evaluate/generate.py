"""`hdpo generate`: continue conversations with any model directory, with or without tools."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from hdpo_jax.config import AgentConfig, Dtype, ModelConfig, RolloutConfig, ToolsConfig
from hdpo_jax.evaluate.messages import GivenMessages, encode_given, power_of_two, read_conversations
from hdpo_jax.files import write_text_atomically
from hdpo_jax.tools.protocol import TOOL_CALL_END, parse_tool_call
from hdpo_jax.tools.system_prompt import system_prompt, told_of_tools
from hdpo_jax.tools.toolbox import open_toolbox
from hdpo_jax.train.policy import Policy, load_policy
from hdpo_jax.types import Prompt, ToolCall, Trajectory
from models.qwen3_vl.images import merge_side
from sharding.mesh import MeshAxes

SLOTS, ROWS = 16, 4
MAX_PIECE = 1_024
"""Tokens of a prompt that are computed at a time."""
PAGE = 32


def generate_file(
    model: Path,
    messages: Path,
    output: Path,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    tools: ToolsConfig | None = None,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
) -> None:
    """Writes one JSON object a conversation: text, token_ids, logprobs, stop_reason, tool_calls.

    `token_ids` and `logprobs` are those of the sampled tokens, the closing one included. Without tools, calls are
    parsed and reported but not run; with tools, conversations without a system message get one that describes them.
    """
    conversations = read_conversations(messages)
    with open_toolbox(tools) if tools else contextlib.nullcontext() as toolbox:
        if toolbox:
            conversations = [_told_of_tools(conversation, toolbox.schemas) for conversation in conversations]
        policy = load_policy(ModelConfig(path=str(model), dtype=dtype), MeshAxes())
        rollout = _rollout_for(policy, conversations, max_new_tokens, temperature, with_tools=tools is not None)
        agent = AgentConfig(
            max_response_tokens=max_new_tokens,
            max_calls=10 if tools else 0,
            max_observation_tokens=power_of_two(max_new_tokens),
        )
        sampler = policy.sampler(toolbox, agent=agent, rollout=rollout, seed=seed)
        prompts = [
            Prompt(
                id=str(conversation.line),
                messages=conversation.messages,
                images=conversation.images,
                videos=conversation.videos,
                ground_truth="",
                data_source=str(messages),
            )
            for conversation in conversations
        ]
        with Progress() as progress:
            task = progress.add_task("generate", total=len(prompts))
            trajectories = sampler.sample(
                policy.params, prompts, samples=1, step=0, on_finished=lambda _: progress.advance(task)
            )
    lines = [json.dumps(_record(trajectory), ensure_ascii=False) for trajectory in trajectories]
    write_text_atomically(output, "\n".join(lines) + "\n")


def _told_of_tools(conversation: GivenMessages, schemas: Sequence[Mapping[str, Any]]) -> GivenMessages:
    return replace(conversation, messages=told_of_tools(conversation.messages, system_prompt(schemas)))


def _record(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "text": trajectory.response_text,
        "token_ids": trajectory.token_ids[trajectory.sampled].tolist(),
        "logprobs": trajectory.logprobs[trajectory.sampled].tolist(),
        "stop_reason": trajectory.stop.value,
        "tool_calls": [
            {"name": call.name, "arguments": dict(call.arguments)} | ({"error": call.error} if call.error else {})
            for turn in trajectory.turns
            if turn.role == "assistant"
            for call in _calls(turn.text)
        ],
    }


def _calls(text: str) -> list[ToolCall]:
    """Every call in a turn. Where tools run a turn ends at the first; where none does, several may follow."""
    pieces = text.split(TOOL_CALL_END)[:-1]
    return [call for piece in pieces if (call := parse_tool_call(piece + TOOL_CALL_END))]


def _rollout_for(
    policy: Policy, conversations: Sequence[GivenMessages], max_new_tokens: int, temperature: float, *, with_tools: bool
) -> RolloutConfig:
    """Static shapes that fit these conversations: powers of two, text and images apart."""
    sizes = []
    for conversation in conversations:
        encoded = encode_given(policy.processor, conversation)
        sizes.append((len(encoded.token_ids), sum(len(image.patches) for image in encoded.images)))
    tokens, patches = (max(size) for size in zip(*sizes, strict=True))
    rows, length = min(ROWS, len(conversations)), min(MAX_PIECE, power_of_two(tokens))
    # What tools show is bounded by the response's tokens, which four patches each are merged into.
    shown = merge_side(policy.model.config) ** 2 * max_new_tokens if with_tools else 0
    return RolloutConfig(
        slots=min(SLOTS, len(conversations)),
        capacity=tokens + max_new_tokens,
        patches=patches + shown,
        page=PAGE,
        shapes=(
            (rows, length, 0),
            *([(rows, length, power_of_two(max(patches, shown)))] if patches + shown else []),
        ),
        temperature=temperature,
    )
