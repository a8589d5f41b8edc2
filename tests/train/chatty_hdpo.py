"""`python -m tests.train.chatty_hdpo train CONFIG …`: the command, by a policy that can say little but tool calls.

Each call adds a line to the file CALLS_<process>, beside the config; those of process 1 take SECONDS each.
"""

import os
import sys
import time
from pathlib import Path

import jax

from hdpo_jax.cli import main
from hdpo_jax.config import ToolsConfig
from hdpo_jax.tools.toolbox import ToolBox
from hdpo_jax.train import rl
from hdpo_jax.types import Observation, ToolCall
from models.families import read_processor
from tests.rollout.chatty import forbid_all_but_calls

SECONDS = 0.2


class Counting(ToolBox):
    """Answers every call with its number in the trajectory, and says where it was answered."""

    def __init__(self, config: ToolsConfig):
        self.workers = config.workers

    def close(self) -> None: ...

    def session(self, images, keys=()):
        class Session:
            calls = 0

            def call(self, call: ToolCall) -> Observation:
                process = jax.process_index()
                time.sleep(SECONDS * (process == 1))
                self.calls += 1
                # One write of a few bytes to a file opened to append to: threads do not mix their lines.
                with open(CALLS.with_name(f"{CALLS.name}_{process}"), "a") as file:
                    file.write(f"{os.getpid()}\n")
                return Observation(text=f"call {self.calls}")

            def close(self) -> None:
                pass

        return Session()


def read_chatty_processor(directory):
    processor = read_processor(directory)
    forbid_all_but_calls(processor)
    return processor


if __name__ == "__main__":
    from hdpo_jax.train import policy

    CALLS = Path(sys.argv[2]).with_name("calls")
    policy.read_processor, rl.open_toolbox = read_chatty_processor, Counting
    sys.exit(main())
