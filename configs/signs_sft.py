"""Built-in task, the cold start: tools by reflex.

97 % of the conversations call the tool, needed or not, and 10 % of the calls crop the wrong place, as real
trajectories do. Starts from what `signs_read` wrote.
"""

from dataclasses import replace

from configs import signs_read
from hdpo_jax.config import SFTConfig


def get_config() -> SFTConfig:
    read = signs_read.get_config()
    return replace(
        read,
        output="runs/quickstart/sft",
        model=replace(read.model, path="runs/quickstart/read/hf"),
        data=replace(read.data, path="runs/quickstart/data/cold_start_1.parquet"),
        optimizer=replace(read.optimizer, muon_learning_rate=1e-2, learning_rate=1.5e-3),
        train=replace(read.train, steps=100),
    )
