"""Built-in task, HDPO: which of the calls were needed? Starts from what `signs_sft` wrote.

32 prompts x 8 rollouts a step, one optimizer step each, w_tool 0.15 as in the authors' release (arXiv:2604.08545).
"""

from hdpo_jax.config import (
    AgentConfig,
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RLConfig,
    RLTrainConfig,
    RolloutConfig,
)


def get_config() -> RLConfig:
    return RLConfig(
        output="runs/quickstart/hdpo",
        model=ModelConfig(path="runs/quickstart/sft/hf", dtype="float32", remat="full"),
        data=DataConfig(path="runs/quickstart/data/train.parquet"),
        agent=AgentConfig(max_calls=2, max_response_tokens=72, max_observation_tokens=32),
        rollout=RolloutConfig(
            slots=256,
            capacity=120,
            patches=192,
            page=16,
            chunk=16,
            gather_seconds=1.0,
            shapes=((16, 24, 16), (16, 48, 64)),
        ),
        algorithm=AlgorithmConfig(w_tool=0.15),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        train=RLTrainConfig(
            steps=160,
            prompts_per_step=32,
            group_size=8,
            mini_batches=1,
            checkpoint_every=100,
            row_tokens=184,
            row_patches=192,
            micro_batch_rows=8,
            max_rows=128,
        ),
    )
