"""The process that math-verify runs in: pairs of LaTeX expressions in, `true`, `false` or `null` out, as JSON lines.

Run as a file, never imported: it brings in nothing of this package, so it starts as fast as SymPy does. What a
policy writes can keep SymPy busy for ever or take all memory, so the process bounds both for itself: its parent
may be gone when it matters.
"""

import contextlib
import json
import os
import resource
import sys
import time

CPU_SECONDS = 30
MEMORY_BYTES = 2 << 30


def _bound_cpu() -> None:
    """Moves the CPU limit ahead of what is used so far: unlike a signal handler, it stops C code too."""
    used = int(time.process_time())
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, hard))


def main() -> None:
    # Whatever a library prints goes to stderr: only answers may stand on the pipe.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))

    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(latex: str) -> list:
        # Without the second element, the text itself: texts are compared by the caller.
        found = parse(f"${latex}$", extraction_config=(LatexExtractionConfig(),))
        return [value for value in found if not isinstance(value, str)]

    def equal(prediction: str, truth: str) -> bool | None:
        gold, guess = parsed(truth), parsed(prediction)
        if not gold or not guess:
            return None
        return bool(verify(gold, guess))

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        _bound_cpu()
        try:
            answer = equal(*json.loads(line))
        except Exception:
            answer = None
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
