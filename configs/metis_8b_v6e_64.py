"""HDPO on Qwen3-VL-8B on a v6e-64 slice (64 chips), with the hyperparameters of Metis-8B-RL (arXiv:2604.08545).

As `metis_8b_v5p_128`, within a third of its memory: fewer slots, room for 512 rows of 40,960 tokens in a step (a
fuller one compiles again), and a decoder that is split over the four chips of a row while sampling.
Not run yet; what it takes, by program:

    hdpo plan metis_8b_v6e_64
"""

from dataclasses import replace

from configs import metis_8b_v5p_128
from hdpo_jax.config import RLConfig


def get_config() -> RLConfig:
    base = metis_8b_v5p_128.get_config()
    return replace(
        base,
        output="runs/metis_8b_v6e_64",
        topology="v6e:8x8",
        rollout=replace(
            base.rollout,
            slots=256,
            pages=64 * (2 * 24_576 // 128 + 4 * (16_384 // 128 + 1)),
            shapes=((64, 256, 0), (64, 2_048, 0), (64, 4_096, 20_480)),
            parameters="sharded",
        ),
        train=replace(base.train, max_rows=512),
    )
