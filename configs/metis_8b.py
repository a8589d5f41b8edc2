"""HDPO on Qwen3-VL-8B, with the hyperparameters of the paper's Metis-8B-RL (arXiv:2604.08545).

128 prompts x 16 rollouts a step, two optimizer steps each, AdamW at 1e-6, prompts up to 24,576 tokens, responses up to
16,384 over up to 10 calls. The paper's model went from 98 % of answers with tools to 2 %. Not run here; for
slices of TPUs, with what they take: `metis_8b_v5p_128` and `metis_8b_v6e_64`.

    hdpo train metis_8b --model.path COLD_STARTED_HF_DIR --data.path METIS_RL_PARQUET --mesh.tensor 4

Rules judge the answers; what they can not tell counts as wrong. With a language model behind them, as in the paper
(its key, if any, in HDPO_JUDGE_API_KEY):

    --rewards.verifiers rules judge --rewards.judge.url http://JUDGE:8000/v1 --rewards.judge.model MODEL
"""

from hdpo_jax.config import DataConfig, ModelConfig, RLConfig, RolloutConfig


def get_config() -> RLConfig:
    return RLConfig(
        output="runs/metis_8b",
        model=ModelConfig(path="Metis-8B-ColdStart", size="8B", dtype="bfloat16"),
        data=DataConfig(path="Metis-RL"),
        # 64 responses and the 4 prompts they go on from, all at their longest: 43 % of 64 slots at their capacity.
        rollout=RolloutConfig(pages=4 * 24_576 // 64 + 64 * (16_384 // 64 + 1)),
    )
