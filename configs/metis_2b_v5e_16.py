"""HDPO on Qwen3-VL-2B on a v5e-16 slice (16 chips): the settings of Metis-8B-RL (arXiv:2604.08545) on small chips.

Room for 128 rows of 40,960 tokens in a step (a fuller one compiles again). Not run yet; what it takes, by program:

    hdpo plan metis_2b_v5e_16
"""

from dataclasses import replace

from configs import metis_8b_v5p_128
from hdpo_jax.config import ModelConfig, RLConfig
from sharding.mesh import MeshAxes


def get_config() -> RLConfig:
    base = metis_8b_v5p_128.get_config()
    return replace(
        base,
        output="runs/metis_2b_v5e_16",
        topology="v5e:4x4",
        model=ModelConfig(path="Qwen3-VL-2B-Instruct", size="2B"),
        mesh=MeshAxes(fsdp=4, context=4),
        rollout=replace(
            base.rollout,
            slots=32,
            pages=16 * (24_576 // 128 + 2 * (16_384 // 128 + 1)),
            shapes=((16, 256, 0), (16, 2_048, 0), (16, 4_096, 20_480)),
            parameters="sharded",
        ),
        train=replace(base.train, micro_batch_rows=4, max_rows=128),
    )
