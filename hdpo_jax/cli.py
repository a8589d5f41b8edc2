"""The command line, `hdpo`. Help does not wait for JAX, and an error is one readable line."""

import glob
import logging
import os
import re
import sys
from collections.abc import Sequence

from hdpo_jax.errors import Stopped

HELP = """\
usage: hdpo COMMAND [OPTIONS]

Qwen3-VL and HDPO in JAX: agents that learn when a tool is worth its call.

  quickstart        cold start, HDPO, evaluation, report and export on built-in data
  sft CONFIG        supervised cold start; resumes by itself
  train CONFIG      HDPO, or one of its baselines; resumes by itself
  eval              accuracy and tool use of a model on a file of prompts
  generate          continue conversations, with tools where asked for
  score             teacher-forced log-probs of conversations
  chat              a conversation in the terminal, with images and tools
  serve             OpenAI-compatible requests, for many clients at a time
  serve-tools       run the tools of trajectories that are sampled elsewhere
  data              prepare data: indices for searches (hdpo data --help)
  import-hf         HF safetensors to an Orbax checkpoint
  export-hf         a checkpoint to HF safetensors
  plan CONFIG       what a run takes on its TPU slice, without a TPU
  report RUN_DIR    one HTML page: curves and a trajectory browser

CONFIG is a Python file, or the name of one in configs/; flags override its fields (--train.steps 50).
`hdpo COMMAND --help` lists the flags. --debug shows the traceback of an error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 2 where flags or a config do not fit, 1 after any other error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    # What a run has to say on the way goes between its progress lines, in the same plain words.
    logging.basicConfig(format="hdpo: %(message)s")
    # That PyTorch is not there is no news: transformers only brings the tokenizers.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not has_accelerator():
        # With the TPU compiler installed, JAX would look for a TPU first, and say at length that there is none.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return dispatch([argument for argument in given if argument != "--debug"])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Stopped as stopped:
        return _fail(str(stopped), stopped.status)
    except Exception as error:
        if debug:
            raise
        return _fail(describe(error), 2 if is_misuse(error) else 1)


def has_accelerator() -> bool:
    """Whether this machine shows a device file of a TPU or a GPU."""
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd"))


def dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if arguments else 2
    from hdpo_jax.commands import run_command

    name, *flags = arguments
    run_command(name, flags)
    return 0


def is_misuse(error: Exception) -> bool:
    """Whether the command was given wrongly, rather than failed."""
    from hdpo_jax.config import ConfigError

    return isinstance(error, ConfigError)


def describe(error: Exception, limit: int = 600) -> str:
    """One line that says what an error says; its type where the text alone would not be a sentence."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return _out_of_memory(text)
    if len(text) > limit:
        text = f"{text[:limit]} [… --debug shows all]"
    speaks = isinstance(error, ValueError | OSError | RuntimeError) and " " in text
    return text if speaks else ": ".join(filter(None, (type(error).__name__, text)))


def _out_of_memory(text: str) -> str:
    size = re.search(r"(\d+) bytes", text)
    asked = f"a program asked for {int(size[1]) / 1e9:,.1f} GB" if size else "a program asked for more than there is"
    return (
        f"out of memory: {asked}; lower what is held at a time (rollout.slots, rollout.capacity, rollout.*_shapes, "
        "train.row_tokens, train.row_patches, train.micro_batch_rows), or spread it over more devices (mesh.*)"
    )


def _fail(message: str, status: int) -> int:
    print(f"hdpo: {message}", file=sys.stderr)
    return status
