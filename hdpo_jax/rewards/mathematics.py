"""Are two mathematical expressions the same? math-verify (SymPy), in processes of its own.

math-verify bounds its time by signals, which work in the main thread only and do not stop C code, and some
expressions (`9^{9^{9^9}}`) would keep it busy for ever. So it runs in helper processes that are started at the
first expression, killed when time is up and replaced at the next one. Any thread may ask.
"""

import contextlib
import functools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

WORKER = Path(__file__).with_name("math_worker.py")
INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_", "PYTHON", "VIRTUAL_ENV", "TMPDIR")
"""What a process is told of the environment: no keys, though it only ever parses what a policy writes."""
START_SECONDS = 120.0
MAX_CHARS = 300

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|infty|inf|max|min|gcd|lcm"
_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
_WORD = re.compile(r"[^\W\d_]{2,}")
_SHORT_WORD = re.compile("an|as|at|by|do|if|in|is|it|my|no|of|on|or|so|to|up|we", re.IGNORECASE)
_OPERATOR = re.compile(r"[\\^*/+=<>|√×÷·±≤≥≠≈π∞]")
_WEAK_OPERATOR = re.compile(r"[-,()\[\]{}]")
_CALENDAR = re.compile(r"\d+\s*-\s*\d+|\d+([-/.:])\d+\1\d+")
"""Ranges, dates and versions: 2024-05-01 is not 2018."""
_UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}|\\?(%)|(?:\^\s*\{?\\circ\}?|(°))")
_SEVERAL = re.compile(r"\\\\|\\q?quad\b|;|\d\s+\d")
"""What math-verify reads the first part of, silently."""
_MIXED = re.compile(r"(?<![\d./^{])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d./])")
_PLAIN = {
    r"\left": "",
    r"\right": "",
    "**": "^",
    "≈": "=",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
}
_INLINE = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def same_expression(prediction: str, truth: str) -> bool | None:
    """Whether both say the same in mathematics; None where either is no expression, or time is up.

    A unit (also % and °) must stand on both sides or on neither: math-verify drops units, and takes 50% for 50 and
    for 0.5. Text that is no expression costs microseconds and starts nothing.
    """
    if max(len(prediction), len(truth)) > MAX_CHARS:
        return None
    left, right = _expression(prediction), _expression(truth)
    if left is None or right is None or not (_has_operator(left) or _has_operator(right)):
        return None
    if _units(left) != _units(right):
        return None
    left, right = latex(left), latex(right)
    if _SEVERAL.search(left) or _SEVERAL.search(right):
        return None
    return _ask(left, right)


def latex(expression: str) -> str:
    """Plain mathematics (`sqrt(2)`, `3×10^-4`, `1 1/2`, `2√3`) in the LaTeX that math-verify reads; units left out."""
    text = _UNIT.sub("", expression)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    for plain, command in _PLAIN.items():
        text = text.replace(plain, command)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?:√|\bsqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(\d)[eE]([+-]?\d+)\b", r"\1 \\times 10^{\2}", text)
    text = re.sub(r"\^\s*([+-]\d+(?:\.\d+)?)", r"^{\1}", text)
    return _FUNCTION.sub(r"\\\1 ", text).replace(r"\inf ", r"\infty ").strip()


def _expression(text: str) -> str | None:
    """The one expression that the text is, or that its only $…$ holds; None for prose, dates and codes."""
    if "$" in text or r"\(" in text or r"\[" in text:
        found = [next(group for group in match.groups() if group) for match in _INLINE.finditer(text)]
        if len(found) != 1 or _INLINE.sub("", text).count("$"):
            return None
        text = found[0].strip()
    if _CALENDAR.fullmatch(text):
        return None
    letters = re.sub(r"\\[A-Za-z]+", " ", _FUNCTION.sub(" ", _UNIT.sub(" ", text)))
    words = _WORD.findall(letters)
    if any(len(word) > 2 or _SHORT_WORD.fullmatch(word) for word in words):
        return None
    return text


def _has_operator(text: str) -> bool:
    # A hyphen or comma between capitals is a code ("K7-Q2"), not a difference.
    capitals = any(letter.isupper() for letter in text)
    return bool(_OPERATOR.search(text)) or (not capitals and bool(_WEAK_OPERATOR.search(text)))


def _units(text: str) -> list[str]:
    found = ["".join(group or "" for group in match.groups()) for match in _UNIT.finditer(text)]
    return [unit.strip() or "°" for unit in found]


class MathProcesses:
    """A few math-verify processes, started when first needed and replaced when they are lost."""

    def __init__(self, *, seconds: float = 3.0, processes: int = 2):
        self._seconds = seconds
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def equal(self, prediction: str, truth: str) -> bool | None:
        """Whether two LaTeX expressions are equal; None where either can not be read, or time is up."""
        question = json.dumps([prediction, truth]) + "\n"
        process = self._idle.get()
        try:
            # A process that died may have died of an earlier question: a fresh one is asked once more.
            for _ in range(2):
                process = process or self._start()
                try:
                    answer = self._exchange(process, question, self._seconds)
                except TimeoutError:
                    answer = "null"
                if process.poll() is not None or not answer:
                    _stop(process)
                    process = None
                if answer:
                    return json.loads(answer)
        finally:
            self._idle.put(process)
        return None

    def close(self) -> None:
        """Ends the processes that run; a later question starts new ones."""
        for _ in range(self._idle.qsize()):
            process = self._idle.get()
            if process is not None:
                _stop(process)
            self._idle.put(None)

    def _start(self) -> subprocess.Popen:
        # -P: the worker's own folder must not come before the standard library on its path.
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            env={name: value for name, value in os.environ.items() if name.startswith(INHERITED)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        weakref.finalize(self, _stop, process)
        if self._exchange(process, "", START_SECONDS) != "ready\n":
            _stop(process)
            raise RuntimeError(
                "math-verify does not start, and mathematical answers can not be judged without it: "
                f"run `{sys.executable} -c 'import math_verify'` to see why"
            )
        return process

    def _exchange(self, process: subprocess.Popen, question: str, seconds: float) -> str:
        """The worker's next line, empty where it died. Raises TimeoutError after `seconds`: it is killed then."""
        assert process.stdin and process.stdout
        time_is_up = threading.Event()

        def give_up() -> None:
            # Killing the process ends the read below, in whatever thread it is: no signal is needed.
            time_is_up.set()
            process.kill()

        alarm = threading.Timer(seconds, give_up)
        alarm.daemon = True
        alarm.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if time_is_up.is_set() and not line:
            process.wait()
            raise TimeoutError
        return line


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # What a dead process did not read is still in the buffer, and closing tries to send it.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@functools.cache
def _processes() -> MathProcesses:
    return MathProcesses()


@functools.lru_cache(maxsize=4096)
def _ask(prediction: str, truth: str) -> bool | None:
    # The rollouts of a group repeat each other's answers: each costs, or times out, once.
    return _processes().equal(prediction, truth)
