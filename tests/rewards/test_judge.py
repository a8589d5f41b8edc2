"""The judge against real endpoints: bounded, patient where that helps, cached, and never wrong by an outage."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from hdpo_jax.config import ConfigError, JudgeConfig
from hdpo_jax.rewards import Claim, VerifierOutage
from hdpo_jax.rewards.judge import Judge
from tests.rewards.judge_server import Asked, JudgeServer, Raw, careful, completion, dribble, shown

ZEBRA, HORSE = (Claim("What is it?", prediction, ("a zebra", "zebra")) for prediction in ("Zebra", "horse"))
CONFIG = JudgeConfig(url="http://127.0.0.1:1/v1", model="judge", timeout_seconds=20.0)


def judge_of(server: JudgeServer, *, pause_seconds: float = 0.01, **settings: Any) -> Judge:
    return Judge(replace(CONFIG, url=server.url, **settings), pause_seconds=pause_seconds)


def in_turn(*answers: Any) -> Callable[[Asked], Any]:
    """What a server answers first, second, …; the last for good."""
    left = list(answers)

    def answer(asked: Asked) -> Any:
        found = left.pop(0) if len(left) > 1 else left[0]
        return found(asked) if callable(found) else found

    return answer


def test_it_says_what_the_model_says():
    with JudgeServer(careful) as server, judge_of(server) as judge:
        assert judge(ZEBRA) is True and judge(HORSE) is False
        (asked, _) = server.asked
        assert asked.body["temperature"] == 0 and asked.body["model"] == "judge" and asked.body["max_tokens"] == 2_048
        assert shown(asked, "question") == ["What is it?"] and shown(asked, "ground_truths") == ["a zebra", "zebra"]


def test_a_reasoning_model_may_think_first():
    said = in_turn("<think>A zebra is not INCORRECT.</think>\n\nCORRECT", " incorrect.\n")
    with JudgeServer(said) as server, judge_of(server) as judge:
        assert judge(ZEBRA) is True and judge(HORSE) is False


def test_so_many_questions_at_a_time_and_no_more():
    def slow(asked: Asked) -> str:
        time.sleep(0.05)
        return careful(asked)

    claims = [Claim("?", f"answer {number}", (f"answer {number // 2 * 2}",)) for number in range(40)]
    with JudgeServer(slow) as server, judge_of(server, concurrency=5) as judge, ThreadPoolExecutor(40) as pool:
        verdicts = list(pool.map(judge, claims))
        assert verdicts == [number % 2 == 0 for number in range(40)]
        assert server.most == 5 and len(server.asked) == 40


@pytest.mark.parametrize(
    "trouble",
    [
        Raw(429, [b'{"error": {"message": "slow down"}}']),
        Raw(500, [b"<html>oh no</html>"], {"content-type": "text/html"}),
        Raw(503),
        Raw(408),
        Raw(200, [b"<html>a login page</html>"], {"content-type": "text/html"}),
        Raw(200, [b'{"choices": []}']),
        Raw(200, [b'{"choices": [{}]}']),
        Raw(200, [b'{"choices"']),
        Raw(200, [b"null"]),
        Raw(200, [b"[1]"]),
        Raw(200, [b""]),
        Raw(200, [b"ab"], {"content-length": "10"}),
    ],
    ids=lambda raw: f"{raw.status} {b''.join(raw.body)[:20]}",
)
def test_what_passes_is_tried_again(trouble):
    with JudgeServer(in_turn(trouble, trouble, careful)) as server, judge_of(server, attempts=3) as judge:
        assert judge(ZEBRA) is True
        assert len(server.asked) == 3
    with JudgeServer(in_turn(trouble)) as server, judge_of(server, attempts=3) as judge:
        with pytest.raises(
            VerifierOutage, match=r"^the judge \(judge at 127.0.0.1:[0-9]+\) can not be asked: "
        ) as outage:
            judge(HORSE)
        assert len(server.asked) == 3 and "\n" not in str(outage.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_does_not_pass_is_not_tried_again(status, monkeypatch):
    """And the key, which servers repeat when they refuse it, is in no error."""
    monkeypatch.setenv("HDPO_JUDGE_API_KEY", "sk-very-secret")
    refusal = Raw(status, [b'{"error": {"message": "no: sk-very-secret is not known"}}'])
    with JudgeServer(in_turn(refusal)) as server, judge_of(server) as judge:
        with pytest.raises(VerifierOutage, match=rf"can not be asked: .*{status}.*\[key\] is not known") as outage:
            judge(ZEBRA)
        assert "secret" not in str(outage.value) and len(server.asked) == 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("HDPO_JUDGE_API_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-someone-else")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-someone-else")
    with caplog.at_level(logging.DEBUG), JudgeServer(careful) as server, judge_of(server) as judge:
        judge(ZEBRA)
        (asked,) = server.asked
    assert asked.headers["authorization"] == "Bearer sk-very-secret"
    assert "of-someone-else" not in str(asked)
    assert "sk-very-secret" not in caplog.text
    monkeypatch.delenv("HDPO_JUDGE_API_KEY")
    with JudgeServer(careful) as server, judge_of(server) as judge:
        judge(ZEBRA)
        assert server.asked[0].headers["authorization"] == "Bearer none"


def test_pauses_grow_and_the_server_may_ask_for_a_longer_one():
    busy = Raw(429, [], {"retry-after": "0.4"})
    times = []

    def answer(asked: Asked) -> str | Raw:
        times.append(time.monotonic())
        return busy if len(times) == 1 else Raw(500) if len(times) < 4 else "CORRECT"

    with JudgeServer(answer) as server, judge_of(server, pause_seconds=0.05) as judge:
        assert judge(ZEBRA) is True
    first, second, third = (after - before for before, after in zip(times, times[1:], strict=False))
    assert first >= 0.4
    # Drawn at random below 0.1 and 0.2 s; the rest is the machine's.
    assert second < 0.1 + 1.0 and third < 0.2 + 1.0


@pytest.mark.parametrize("hang", ["silent", "dribbles"])
def test_an_attempt_has_its_time_whatever_the_server_sends(hang):
    """A limit on silence, as HTTP clients have it, would wait for the dribble to end: 20 s."""

    def answer(asked: Asked) -> Raw:
        if hang == "silent":
            time.sleep(3)
        return Raw(200, dribble(b" ", seconds=20))

    with JudgeServer(answer) as server, judge_of(server, attempts=2, timeout_seconds=1) as judge:
        started = time.monotonic()
        with pytest.raises(VerifierOutage, match="no answer within 1 s"):
            judge(ZEBRA)
        assert time.monotonic() - started < 10 and len(server.asked) == 2


def test_nobody_there_is_an_outage():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    judge = Judge(replace(CONFIG, url=f"http://user:password@127.0.0.1:{port}/v1", attempts=2), pause_seconds=0.01)
    with (
        judge,
        pytest.raises(VerifierOutage, match=rf"^the judge \(judge at 127.0.0.1:{port}\) can not be asked: ") as said,
    ):
        judge(ZEBRA)
    assert "password" not in str(said.value)


def test_what_is_no_verdict_is_asked_again_once_in_other_words():
    with JudgeServer(in_turn("Well, it is striped.", "CORRECT")) as server, judge_of(server) as judge:
        assert judge(ZEBRA) is True
        first, second = (asked.messages[0]["content"] for asked in server.asked)
        assert first != second
    with JudgeServer(in_turn("Well, it is striped.")) as server, judge_of(server) as judge:
        with pytest.raises(VerifierOutage, match="says 'Well, it is striped.'; expected CORRECT or INCORRECT"):
            judge(ZEBRA)
        assert len(server.asked) == 2
    # One question that it can not deal with is one outage; the others go on.
    puzzled = JudgeServer(lambda asked: "?" if "horse" in str(asked.messages) else "CORRECT")
    with puzzled as server, judge_of(server) as judge:
        with pytest.raises(VerifierOutage):
            judge(HORSE)
        assert judge(ZEBRA) is True


def test_a_model_that_says_nothing_is_no_verdict():
    silent = JudgeServer(in_turn(completion(None)))
    with silent as server, judge_of(server) as judge, pytest.raises(VerifierOutage, match="says ''"):
        judge(ZEBRA)


def test_the_same_claim_is_asked_about_once_also_while_it_is_under_way():
    together = threading.Barrier(8)

    def slow(asked: Asked) -> str:
        time.sleep(0.3)
        return careful(asked)

    def ask(_: int) -> bool:
        together.wait()
        return judge(ZEBRA)

    with JudgeServer(slow) as server, judge_of(server) as judge, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [True] * 8
        assert judge(ZEBRA) is True
        assert len(server.asked) == 1
        tally = judge.take_tally()
        assert (tally.asked, tally.cached) == (1, 8) and 0.3 <= tally.seconds < 3
        assert judge.take_tally().asked == 0


def test_verdicts_outlive_the_process_and_failures_do_not(tmp_path):
    folder = str(tmp_path / "verdicts")
    with JudgeServer(in_turn(careful, Raw(400), careful)) as server:
        with judge_of(server, cache=folder) as judge:
            assert judge(ZEBRA) is True
            with pytest.raises(VerifierOutage):
                judge(HORSE)
        with judge_of(server, cache=folder) as again:
            assert again(ZEBRA) is True
            assert len(server.asked) == 2  # the zebra's verdict was there
            assert again(HORSE) is False
            assert len(server.asked) == 3  # the horse's failure was not
        kept = [path for path in (tmp_path / "verdicts").glob("*/*") if path.is_file()]
        assert len(kept) == 2 and not any("zebra" in path.read_text() for path in kept)


@pytest.mark.parametrize("torn", [b"", b"{", b"null", b'{"correct": "yes"}', b"\xff"])
def test_a_torn_file_of_the_cache_is_not_believed(tmp_path, torn):
    with JudgeServer(careful) as server, judge_of(server, cache=str(tmp_path)) as judge:
        assert judge(ZEBRA) is True
        (file,) = tmp_path.glob("??/*.json")
        file.write_bytes(torn)
        with judge_of(server, cache=str(tmp_path)) as again:
            assert again(ZEBRA) is True
        assert len(server.asked) == 2 and b"true" in file.read_bytes()


def test_a_cache_that_can_not_be_written_is_refused_at_once_and_later_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^rewards.judge.cache is '.*file/verdicts', where nothing can be written: "):
        Judge(replace(CONFIG, cache=str(tmp_path / "file" / "verdicts")))
    with JudgeServer(careful) as server, judge_of(server, cache=str(tmp_path / "folder")) as judge:
        (tmp_path / "folder" / "about.json").unlink()
        (tmp_path / "folder").rmdir()
        (tmp_path / "folder").write_text("")
        assert judge(ZEBRA) is True and judge(HORSE) is False
    assert [record.message.startswith("verdicts are no longer kept") for record in caplog.records] == [True]


def test_another_wording_of_the_prompt_is_another_key(tmp_path, monkeypatch):
    from hdpo_jax.rewards import judge_prompt

    with JudgeServer(careful) as server:
        for _ in range(2):
            with judge_of(server, cache=str(tmp_path)) as judge:
                judge(ZEBRA)
        assert len(server.asked) == 1
        reworded = judge_prompt.FORMS[0]._replace(closing="Well?")
        monkeypatch.setattr(judge_prompt, "FORMS", (reworded, *judge_prompt.FORMS[1:]))
        with judge_of(server, cache=str(tmp_path)) as judge:
            judge(ZEBRA)
        assert len(server.asked) == 2


@pytest.mark.parametrize(("third", "verdict"), [("CORRECT", True), ("INCORRECT", False)])
def test_a_double_check_asks_in_other_words_and_a_third_wording_decides(third, verdict):
    with JudgeServer(in_turn("CORRECT", "INCORRECT", third)) as server, judge_of(server, double_check=1.0) as judge:
        assert judge(ZEBRA) is verdict
        assert len({asked.messages[0]["content"] for asked in server.asked}) == 3
        orders = [
            [line for line in asked.messages[1]["content"].split("\n") if line.startswith("<") and "/" not in line]
            for asked in server.asked
        ]
        assert len({tuple(part.split("_")[0] for part in order) for order in orders}) == 3
        tally = judge.take_tally()
        assert (tally.asked, tally.checked, tally.disagreed) == (1, 1, 1)
    with JudgeServer(careful) as server, judge_of(server, double_check=1.0) as judge:
        assert judge(ZEBRA) is True and judge(HORSE) is False
        tally = judge.take_tally()
        assert (len(server.asked), tally.checked, tally.disagreed) == (4, 2, 0)


def test_which_claims_are_checked_twice_is_theirs_and_not_chance():
    claims = [Claim("?", f"answer {number}", ("another",)) for number in range(60)]
    asked = []
    for _ in range(2):
        with JudgeServer(careful) as server, judge_of(server, double_check=0.5) as judge:
            for claim in claims:
                judge(claim)
            asked.append([shown(one, "prediction")[0] for one in server.asked])
    assert asked[0] == asked[1]
    assert 15 < len(asked[0]) - len(claims) < 45


@pytest.mark.timeout(30)
def test_closing_gives_up_what_is_under_way():
    """Ctrl-C does not wait for a judge that hangs: not for its 20 s, and not for its attempts."""
    with JudgeServer(lambda asked: Raw(200, dribble(b" ", seconds=5))) as server:
        judge = judge_of(server, concurrency=2)
        with ThreadPoolExecutor(6) as pool:
            claims = [Claim("?", f"answer {number}", ("another",)) for number in range(6)]
            futures = [pool.submit(judge, claim) for claim in claims]
            while len(server.asked) < 2:
                time.sleep(0.01)
            started = time.monotonic()
            judge.close()
            for future in futures:
                assert isinstance(future.exception(timeout=5), VerifierOutage)
            assert time.monotonic() - started < 2
        with pytest.raises(VerifierOutage, match="the judge is closed"):
            judge(HORSE)
        judge.close()
        assert not any(thread.name == "judge" for thread in threading.enumerate())
