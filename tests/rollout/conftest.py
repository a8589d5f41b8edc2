import pytest

from hdpo_jax.data.prompts import PromptDataset
from hdpo_jax.train.policy import Policy
from tests.rollout.chatty import Task, chatty_policy
from tests.small_signs import write_small_signs


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    directory = tmp_path_factory.mktemp("signs")
    files = write_small_signs(directory, conversations=48, boards=8)
    return Task(checkpoint=directory / "model", prompts=list(PromptDataset(files.train)))


@pytest.fixture(scope="session")
def policy(task) -> Policy:
    return chatty_policy(task)
