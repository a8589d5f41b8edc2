"""The built-in task at a size that tests make in a second: files of data, and a checkpoint that knows their words."""

from pathlib import Path

from hdpo_jax.data.signs import SignsConfig, SignsFiles, cold_start_texts, write_signs
from hdpo_jax.data.signs_config import ColdStartPhase
from hdpo_jax.data.tiny_checkpoint import write_tiny_checkpoint


def write_small_signs(directory: Path, *, conversations: int, boards: int) -> SignsFiles:
    """Writes both: the data to `directory`/data, the checkpoint to `directory`/model. `boards`: to train on."""
    phase = ColdStartPhase(conversations=conversations, tool_share_legible=0.5, tool_share_illegible=0.5)
    config = SignsConfig(cold_start=(phase,), train_boards=boards, test_boards=8)
    files = write_signs(directory / "data", config, seed=0)
    write_tiny_checkpoint(directory / "model", seed=0, corpus=cold_start_texts(files.cold_start))
    return files
