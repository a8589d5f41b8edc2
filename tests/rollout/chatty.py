"""A tiny policy that calls tools all the time: random weights, and few tokens to choose from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from hdpo_jax.config import AgentConfig, ModelConfig, RolloutConfig
from hdpo_jax.train.policy import Policy, load_policy
from hdpo_jax.types import Prompt
from models.policy import PolicyProcessor
from sharding.mesh import MeshAxes

AGENT = AgentConfig(max_calls=3, max_response_tokens=120, max_observation_tokens=60)
ROLLOUT = RolloutConfig(
    slots=6,
    capacity=176,
    patches=160,
    page=16,
    chunk=8,
    shapes=((4, 64, 0), (4, 64, 32), (4, 64, 64)),
)


@dataclass(frozen=True, kw_only=True)
class Task:
    checkpoint: Path
    prompts: list[Prompt]


def chatty_policy(task: Task, devices: int = 1) -> Policy:
    """Only `</tool_call>`, the end of a turn and a dozen letters may be sampled: most turns end in a call."""
    config = ModelConfig(path=str(task.checkpoint), dtype="float32", remat="nothing")
    axes = MeshAxes(data=devices // 2, fsdp=2) if devices > 1 else MeshAxes()
    policy = load_policy(config, axes, jax.devices()[:devices], together=True)
    forbid_all_but_calls(policy.processor)
    return policy


def forbid_all_but_calls(processor: PolicyProcessor) -> None:
    """Leaves a policy `</tool_call>`, the end of a turn and a dozen letters to say."""
    allow_only(processor, [*processor.tool_call_end, *processor.encode_text("ABCDEFGHKLMN")])


def forbid_all_but_answers(processor: PolicyProcessor) -> None:
    """Leaves a policy three letters to say, and every turn is read as an answer."""
    allow_only(processor, processor.encode_text("ABC"))
    decode = processor.decode

    def as_answer(ids: Sequence[int] | Int[np.ndarray, " tokens"], *, keep_special: bool = False) -> str:
        return f"<answer>{decode(ids, keep_special=keep_special)}</answer>"

    processor.decode = as_answer


def allow_only(processor: PolicyProcessor, ids: Iterable[int]) -> None:
    """Leaves a policy these tokens, and the end of a turn."""
    forbidden = np.ones_like(processor.forbidden)
    forbidden[[*ids, processor.stop_ids[0]]] = False
    processor.forbidden = forbidden
