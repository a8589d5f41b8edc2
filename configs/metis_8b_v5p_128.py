"""HDPO on Qwen3-VL-8B on a v5p-128 slice (64 chips), with the hyperparameters of Metis-8B-RL (arXiv:2604.08545).

128 prompts x 16 rollouts a step, 24,576 + 16,384 tokens, tool images of 5,120 tokens. Rows of 40,960 tokens are split
over four chips while they are learned; while sampling, every chip holds the decoder in bfloat16. There is room for a
step whose rollouts are all at their longest. Not run yet; what it takes, by program:

    hdpo plan metis_8b_v5p_128
"""

from dataclasses import replace

from configs import metis_8b
from hdpo_jax.config import RLConfig
from sharding.mesh import MeshAxes


def get_config() -> RLConfig:
    base = metis_8b.get_config()
    return replace(
        base,
        output="runs/metis_8b_v5p_128",
        topology="v5p:4x4x4",
        mesh=MeshAxes(fsdp=16, context=4),
        rollout=replace(
            base.rollout,
            slots=512,
            capacity=40_960,
            patches=65_536,
            # A TPU lays out 128 numbers at a time: smaller pages would take as much memory.
            page=128,
            # For the 8 slots of a chip: 4 prompts and 8 responses at their longest.
            pages=64 * (4 * 24_576 // 128 + 8 * (16_384 // 128 + 1)),
            shapes=((64, 256, 0), (64, 2_048, 0), (64, 8_192, 32_768)),
            parameters="gathered",
        ),
        train=replace(base.train, row_tokens=40_960, row_patches=65_536, micro_batch_rows=16, max_rows=2_048),
    )
