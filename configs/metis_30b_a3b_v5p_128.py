"""HDPO on Qwen3-VL-30B-A3B on a v5p-128 slice (64 chips): the settings of `metis_8b_v5p_128` for a mixture of experts.

128 experts a layer, eight a token. Not run yet; what it takes, by program:

    hdpo plan metis_30b_a3b_v5p_128
"""

from dataclasses import replace

from configs import metis_8b_v5p_128
from hdpo_jax.config import ModelConfig, RLConfig


def get_config() -> RLConfig:
    base = metis_8b_v5p_128.get_config()
    return replace(
        base,
        output="runs/metis_30b_a3b_v5p_128",
        model=ModelConfig(path="Qwen3-VL-30B-A3B-Instruct", size="30B-A3B", remat="save_attention"),
        rollout=replace(base.rollout, parameters="sharded"),
        train=replace(base.train, max_rows=1_024),
    )
