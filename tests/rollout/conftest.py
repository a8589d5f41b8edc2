import pytest

from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.data.signs import SignsConfig, cold_start_texts, write_signs
from hdpo_jax.data.signs_config import ColdStartPhase
from hdpo_jax.data.tiny_checkpoint import write_tiny_checkpoint
from hdpo_jax.train.policy import Policy
from tests.rollout.chatty import Task, chatty_policy


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    directory = tmp_path_factory.mktemp("signs")
    phase = ColdStartPhase(conversations=48, tool_share_legible=0.5, tool_share_illegible=0.5)
    files = write_signs(directory / "data", SignsConfig(cold_start=(phase,), train_boards=8, test_boards=8), seed=0)
    write_tiny_checkpoint(directory / "model", seed=0, corpus=cold_start_texts(files.cold_start))
    return Task(checkpoint=directory / "model", prompts=list(PromptDataset(files.train)))


@pytest.fixture(scope="session")
def policy(task) -> Policy:
    return chatty_policy(task)
