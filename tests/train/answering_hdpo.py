"""`python -m tests.train.answering_hdpo train CONFIG …`: the command, by a policy that can say little but answers."""

import sys

from hdpo_jax.cli import main
from models.families import read_processor
from tests.rollout.chatty import forbid_all_but_answers


def read_answering_processor(directory):
    processor = read_processor(directory)
    forbid_all_but_answers(processor)
    return processor


if __name__ == "__main__":
    from hdpo_jax.train import policy

    policy.read_processor = read_answering_processor
    sys.exit(main())
