"""A workload as the trainer gets it: trajectories in families, packed into rows."""

import numpy as np

from hdpo_jax.rollout.packing import Family, group_family
from hdpo_jax.types import Prompt, StopReason, Trajectory
from models.qwen3_vl import EncodedImage, Qwen3VLConfig
from tests.bench.workload import Rollout, Workload


def families(work: Workload, config: Qwen3VLConfig) -> list[Family]:
    """One a prompt, in order."""
    images = [EncodedImage(patches=patches, grid=work.grid) for patches in work.patches]
    finished = [trajectory(rollout, images[rollout.group], work.sizes.prompt_tokens) for rollout in work.rollouts]
    samples = work.sizes.samples
    return [group_family(finished[at : at + samples], at, config) for at in range(0, len(finished), samples)]


def trajectory(rollout: Rollout, image: EncodedImage, prompt_tokens: int) -> Trajectory:
    nothing = np.zeros(len(rollout.token_ids), np.float32)
    return Trajectory(
        prompt=Prompt(id=str(rollout.group), messages=(), images=(), ground_truth="", data_source="bench"),
        group=rollout.group,
        sample=rollout.sample,
        token_ids=rollout.token_ids,
        sampled=rollout.sampled,
        logprobs=nothing,
        sampled_logprobs=nothing,
        prompt_length=prompt_tokens,
        images=[image],
        prompt_images=1,
        turns=(),
        calls=0,
        stop=StopReason.END_OF_TURN,
    )
