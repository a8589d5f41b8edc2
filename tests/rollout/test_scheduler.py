"""What a plan runs, from what there is to compute."""

import numpy as np
import pytest

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.scheduler import Scheduler
from hdpo_jax.rollout.strands import Strand
from tests.models.oracles import oracle


def prompt(tokens: int) -> Strand:
    return Strand([7] * tokens, [], np.arange(tokens, dtype=np.int32).repeat(3).reshape(-1, 3))


@pytest.mark.parametrize(("prompts", "expected"), [(1, [True, False, False]), (2, [False, True, False])])
def test_the_shape_with_the_fewest_rows_that_hold_the_batch_is_computed(prompts, expected):
    config = RolloutConfig(slots=8, capacity=32, page=4, shapes=((1, 16, 0), (4, 16, 0), (4, 32, 0)))
    scheduler = Scheduler(config, oracle("biased, untied").config, lanes=1, recent=0)
    for number in range(prompts):
        question = prompt(9)
        scheduler.open(question, [question.fork((0, number, 0), limit=32)])
    extensions = scheduler.plan().extensions
    assert [extension is not None for extension in extensions] == expected
    (extension,) = (extension for extension in extensions if extension is not None)
    assert (extension.table[:, 0] > 0).sum() == prompts
