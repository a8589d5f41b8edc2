"""math-verify in processes of its own: bounded in time, from any thread, and only where it is needed."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hdpo_jax.rewards.mathematics import MathProcesses, latex, same_expression

# SymPy sets out to write that number down, in C: no signal handler gets a turn.
ENDLESS = "9^{9^{9^9}}"


@pytest.fixture(scope="module")
def processes():
    processes = MathProcesses(seconds=5.0, processes=2)
    yield processes
    processes.close()


@pytest.mark.timeout(60)
def test_an_expression_without_end_is_given_up_and_the_next_one_is_judged(processes):
    processes.equal("1", "1")
    assert processes.equal(ENDLESS, "1") is None
    assert processes.equal("1+1", "2") is True


def test_works_off_the_main_thread(processes):
    # math-verify's own limit raises here: signal only works in main thread.
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda k: processes.equal(f"{k}+1", "3"), range(8)))
    assert verdicts == [k == 2 for k in range(8)]


def test_a_process_that_dies_is_replaced(processes):
    for _ in range(2):
        process = processes._idle.get()
        if process is not None:
            process.kill()
        processes._idle.put(process)
    assert processes.equal(r"\frac{2}{4}", "0.5") is True


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")
def test_keys_of_the_environment_are_not_there(monkeypatch):
    monkeypatch.setenv("HDPO_JUDGE_API_KEY", "sk-very-secret")
    processes = MathProcesses(processes=1)
    assert processes.equal("1+1", "2") is True
    process = processes._idle.get()
    processes._idle.put(process)
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    processes.close()
    assert b"PATH=" in environment and b"secret" not in environment


def test_unreadable_expressions_are_not_judged(processes):
    assert processes.equal(r"\frac{", "1") is None
    assert processes.equal("1\n2\n3", "\ud800") is None
    assert processes.equal("1+1", "2") is True


def test_close_leaves_no_process():
    processes = MathProcesses(processes=1)
    assert processes.equal("1+1", "2") is True
    process = processes._idle.get()
    processes._idle.put(process)
    processes.close()
    assert process is not None and process.poll() is not None


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ("sqrt(2)", r"\sqrt{2}"),
        ("2√x", r"2\sqrt{x}"),
        ("3e-10", r"3 \times 10^{-10}"),
        ("10^-3", "10^{-3}"),
        ("x**2", "x^2"),
        ("sin(x)", r"\sin (x)"),
        (r"\sin x", r"\sin x"),
        ("2pi", r"2\pi"),
        ("2 1/2", "(2+1/2)"),
        ("30°", "30"),
    ],
)
def test_latex(plain, expected):
    assert latex(plain) == expected


def test_plain_words_and_codes_neither_import_sympy_nor_start_a_process():
    program = (
        "import sys, hdpo_jax.rewards.mathematics as m\n"
        "pairs = [('K7-Q2', 'K7-Q3'), ('stop', 'go'), ('12', '13'), ('2024-05-01', '2018'), ('K7,Q2', 'Q2,K7')]\n"
        "assert [m.same_expression(*pair) for pair in pairs] == [None] * 5\n"
        "assert m._processes.cache_info().currsize == 0\n"
        "assert not {'sympy', 'math_verify', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_long_expressions_are_not_judged():
    assert same_expression("1+" * 200 + "1", "201") is None
