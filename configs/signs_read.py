"""Built-in task, before the cold start: a random tiny Qwen3-VL learns to read signs and to crop.

Stands in for the pre-training that a real Qwen3-VL comes with: about half of the conversations call the tool.
`hdpo quickstart` makes the data and the checkpoint, and runs this file, signs_sft and signs_hdpo in turn.
"""

from hdpo_jax.config import DataConfig, ModelConfig, OptimizerConfig, SFTConfig, SFTTrainConfig


def get_config() -> SFTConfig:
    return SFTConfig(
        output="runs/quickstart/read",
        model=ModelConfig(path="runs/quickstart/random", dtype="float32", remat="full"),
        data=DataConfig(path="runs/quickstart/data/cold_start_0.parquet"),
        optimizer=OptimizerConfig(
            name="muon", muon_learning_rate=2e-2, learning_rate=3e-3, schedule="cosine", b2=0.99, weight_decay=0.0
        ),
        train=SFTTrainConfig(
            steps=400,
            batch_size=64,
            checkpoint_every=100,
            row_tokens=152,
            row_patches=192,
            micro_batch_rows=8,
            max_rows=64,
        ),
    )
