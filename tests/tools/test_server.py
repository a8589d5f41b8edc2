"""The tool server over HTTP: its format, its sessions, and what it refuses."""

import base64
import concurrent.futures
import json
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hdpo_jax.config import ToolServerConfig
from tests.tools.serving import (
    ROOT,
    Notebook,
    action,
    eventually,
    notebooks,
    over,
    tool_call,
)

PATH = "/get_observation"
HEADER = b"IHDR" + (60_000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
CHUNKS = (13).to_bytes(4) + HEADER + zlib.crc32(HEADER).to_bytes(4) + (9).to_bytes(4) + b"IDAT"
BOMB = base64.b64encode(b"\x89PNG\r\n\x1a\n" + CHUNKS).decode()
"""The beginning of a PNG file of 3.6 gigapixels."""


@pytest.fixture
def server() -> Iterator[tuple[httpx.Client, Notebook]]:
    with notebooks() as (address, notebook), httpx.Client(base_url=address, timeout=30) as client:
        yield client, notebook


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text(answer: dict[str, Any]) -> str:
    (observation,) = answer["observations"]
    return observation["obs"]


def refusal(client: httpx.Client, body: Any, status: int = 422) -> str:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(PATH, content=content)
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert "\n" not in detail and len(detail) < 400
    return detail


def figures(client: httpx.Client) -> dict[str, float]:
    page = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    # The tool stands before the outcome.
    names = (" ".join([one.name, *(one.labels[key] for key in sorted(one.labels, reverse=True))]) for one in samples)
    return dict(zip(names, (sample.value for sample in samples), strict=True))


def test_a_trainer_of_the_authors_release_gets_what_its_server_says(server, picture):
    """A trajectory as such a trainer sends it, and the answer key by key."""
    client, notebook = server
    answer = ask(client, action("9f3c", tool_call("note", line="a", pictures=1), images=[picture]))
    assert set(answer) == {"observations", "dones", "valids", "processing_time_ms"}
    assert answer["dones"] == [False] and answer["valids"] == [True] and answer["processing_time_ms"] > 0
    (observation,) = answer["observations"]
    assert set(observation) == {"obs", "image", "metrics", "timeout"}
    assert observation["obs"] == "1 images: a" and observation["timeout"] is False
    assert [uri[:22] for uri in observation["image"]] == ["data:image/png;base64,"]
    # It sends its images with every call; a trajectory keeps those of its first.
    assert text(ask(client, action("9f3c", tool_call("note", line="b"), images=[picture, picture]))) == "1 images: a b"
    assert notebook.subjects[0].keys == ["q17"]
    closed = ask(client, over("9f3c"))
    assert closed["dones"] == closed["valids"] == [True] and text(closed) == ""
    assert notebook.open_now == 0 and client.get("/health").json()["sessions"] == 0


def test_only_trajectories_and_actions_are_needed(server):
    client, _ = server
    body = {"trajectory_ids": ["t"], "actions": [tool_call("note", line="a")]}
    assert text(ask(client, body)) == "0 images: a"
    # Numbers, bare names, and fields that others know.
    assert text(ask(client, body | {"trajectory_ids": "t", "queue": [3], "reward": None})) == "0 images: a a"
    assert text(ask(client, body | {"trajectory_ids": [7]})) == "0 images: a"


def test_what_is_not_a_call_is_not_valid_and_says_why(server):
    client, notebook = server
    for turn, said in (
        ("<answer>B</answer>", ""),
        ("", ""),
        ("<tool_call>{</tool_call>", "The tool call is malformed"),
        ("<tool_call>", "The tool call is malformed"),
        (tool_call("nope"), "There is no tool 'nope'. Tools: note."),
        (tool_call("note"), "note: argument `line` is missing"),
    ):
        answer = ask(client, action("t", turn))
        assert text(answer).startswith(said) and (said or text(answer) == "")
        assert answer["valids"] == answer["dones"] == [False]
    assert notebook.written == []


def test_the_last_call_of_a_turn_runs_closed_or_not(server):
    client, notebook = server
    turn = tool_call("note", line="first") + tool_call("note", line="last")
    assert text(ask(client, action("t", turn.removesuffix("</tool_call>")))) == "0 images: last"
    assert notebook.written == ["last"]


def test_calls_that_ran_and_failed_are_valid_and_say_how(server):
    client, _ = server
    expected = {"fail": "failed", "raise": "failed", "lost": "lost", "late": "timeout"}
    for mood in expected:
        answer = ask(client, action(mood, tool_call("note", line="a", mood=mood)))
        (observation,) = answer["observations"]
        assert answer["valids"] == [True] and observation["metrics"]["ok"] is False
        assert observation["metrics"]["lost"] is (mood == "lost") and observation["timeout"] is (mood == "late")
    assert text(ask(client, action("raise", tool_call("note", line="b")))) == "0 images: a b"
    counted = figures(client)
    for outcome in ("failed", "lost", "timeout"):
        assert counted[f"hdpo_tools_calls_total note {outcome}"] == list(expected.values()).count(outcome)


def test_finish_runs_nothing_and_frees_what_was_never_open(server):
    client, notebook = server
    answer = ask(client, over("t") | {"actions": [tool_call("note", line="a")]})
    assert answer["dones"] == answer["valids"] == [True] and notebook.written == []
    ask(client, action("t", tool_call("note", line="a")))
    ask(client, over("t"))
    assert text(ask(client, action("t", tool_call("note", line="b")))) == "0 images: b"


def test_a_batch_is_answered_in_its_order(server):
    client, notebook = server
    turns = [tool_call("note", line="a", seconds=0.3), "no call", tool_call("note", line="b"), "", "x"]
    body = {"trajectory_ids": ["1", "2", "3", "1", "9"], "actions": turns, "finish": [False, False, False, True, True]}
    answer = ask(client, body)
    assert [one["obs"] for one in answer["observations"]] == ["0 images: a", "", "0 images: b", "", ""]
    assert answer["dones"] == [False, False, False, True, True]
    assert answer["valids"] == [True, False, True, True, True]
    assert notebook.open_now == 1


def test_calls_of_a_trajectory_run_in_order_and_others_beside_them(server):
    client, notebook = server
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(ask, client, action("s", tool_call("note", line="s", seconds=1))) for _ in range(3)]
        others = [pool.submit(ask, client, action(str(n), tool_call("note", line="x", seconds=1))) for n in range(4)]
        for future in others:
            assert text(future.result()) == "0 images: x"
        assert time.monotonic() - started < 1.9
        assert sorted(text(future.result()) for future in slow) == ["0 images: " + " ".join("s" * n) for n in (1, 2, 3)]
    assert 3 <= time.monotonic() - started < 6


def test_64_trajectories_at_once_are_not_mixed_up(server, picture):
    client, notebook = server

    def trajectory(number: int) -> None:
        name, images, lines = f"t{number}", [picture] * (number % 3), []
        for call in range(5):
            lines.append(f"{number}.{call}")
            turn = tool_call("note", line=lines[-1], pictures=number % 4, seconds=0.01 * (number % 5))
            (observation,) = ask(client, action(name, turn, images=images if call == 0 else ()))["observations"]
            assert observation["obs"] == f"{len(images)} images: {' '.join(lines)}"
            assert len(observation["image"]) == number % 4
        ask(client, over(name))

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        list(pool.map(trajectory, range(64)))
    assert notebook.open_now == 0 and len(notebook.written) == 320
    assert figures(client)["hdpo_tools_calls_total note ok"] == 320


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\0b", "%s%n{0}", "\n[ERROR] forged", "😀" * 250, " "])
def test_ids_are_names_and_nothing_else(server, name: str, caplog: pytest.LogCaptureFixture):
    client, _ = server
    for lines in ("a", "a a"):
        answer = ask(client, action(name, tool_call("note", line="a"), call_ids=[name if lines == "a" else None]))
        assert text(answer) == f"0 images: {lines}"
    assert text(ask(client, action(name + "x", tool_call("note", line="b")))) == "0 images: b"
    assert "forged" not in caplog.text and "passwd" not in client.get("/metrics").text
    ask(client, over(name))
    assert client.get("/health").json()["sessions"] == 1


def test_bad_requests_are_refused_in_one_line(server, picture):
    client, notebook = server
    good = action("t", tool_call("note", line="a"), images=[picture])

    def images(*uris: Any) -> dict[str, Any]:
        return good | {"extra_fields": [{"images": list(uris)}]}

    for body, said in (
        (b"", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        ([], "should be an object"),
        ({}, "trajectory_ids: Field required"),
        (good | {"trajectory_ids": []}, "trajectory_ids"),
        (good | {"trajectory_ids": [""]}, "trajectory_ids[0]"),
        (good | {"trajectory_ids": ["x" * 1_000_000]}, "trajectory_ids[0]: String should have at most 256 characters"),
        (good | {"call_ids": ["x" * 257]}, "call_ids"),
        (good | {"actions": ["a", "b"]}, "actions has 2 entries, and trajectory_ids has 1"),
        (good | {"finish": []}, "finish has 0 entries, and trajectory_ids has 1"),
        (good | {"finish": ["maybe"]}, "finish[0]"),
        (good | {"is_last_step": [True, True]}, "is_last_step has 2"),
        (good | {"extra_fields": [{}, {}]}, "extra_fields has 2"),
        (good | {"extra_fields": ["x"]}, "extra_fields[0]"),
        (images("/etc/passwd"), "extra_fields[0].images[0] is no data URI"),
        (images("http://169.254.169.254/"), "extra_fields[0].images[0] is no data URI"),
        (images(good["extra_fields"][0]["images"][0], "data:image/png;base64,%%%"), "images[1] is no base64"),
        (images("data:image/png;base64,AAAA"), "images[0] is no image file"),
        (images(f"data:image/png;base64,{BOMB}"), "images[0] has too many pixels"),
        (images(5), "extra_fields[0].images[0]"),
        (images(*good["extra_fields"][0]["images"] * 17), "has 17 images; expected 16 at most"),
        ({"trajectory_ids": ["t"] * 257, "actions": [""] * 257}, "there are 257 actions; expected 256 at most"),
    ):
        assert said in refusal(client, body), body
    assert notebook.written == []
    assert client.get(PATH).status_code == 405 and client.get("/docs").status_code == 404
    assert figures(client)["hdpo_tools_rejected_total invalid"] > 15


def test_bounds_of_bodies_and_images():
    config = ToolServerConfig(body_mb=1, image_mb=1)
    with notebooks(config) as (address, _), httpx.Client(base_url=address) as client:
        body = action("t", tool_call("note", line="a"))
        assert "larger than 1,048,576 bytes" in refusal(client, json.dumps(body | {"x": "y" * 2**20}).encode(), 413)
        chunks = (b" " * 65_536 for _ in range(17))
        assert client.post(PATH, content=chunks).status_code == 413
        assert text(ask(client, body)) == "0 images: a"
        assert figures(client)["hdpo_tools_rejected_total size"] == 2
    with notebooks(ToolServerConfig(image_mb=1)) as (address, _), httpx.Client(base_url=address) as client:
        large = f"data:image/png;base64,{'A' * 2**21}"
        assert "images[0] is larger than 1,048,576 bytes" in refusal(
            client, body | {"extra_fields": [{"images": [large]}]}
        )


def test_the_token_is_asked_for_and_metrics_are_behind_it():
    with notebooks(token="s3cret") as (address, notebook), httpx.Client(base_url=address) as client:
        body = action("t", tool_call("note", line="a"))
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            for answer in (client.post(PATH, json=body, headers=headers), client.get("/metrics", headers=headers)):
                assert answer.status_code == 401
            assert client.get("/health", headers=headers).status_code == 200
        assert notebook.written == []
        client.headers["Authorization"] = "Bearer s3cret"
        assert text(ask(client, body)) == "0 images: a"
        assert figures(client)["hdpo_tools_rejected_total token"] == 3


def test_beyond_loopback_it_does_not_start_without_a_token():
    command = [sys.executable, "-m", "hdpo_jax", "serve-tools", "--host", "0.0.0.0", "--port", "0"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1 and "HDPO_TOOLS_TOKEN is not set" in outcome.stderr


def test_a_full_queue_is_429_and_nothing_of_the_request_runs():
    config = ToolServerConfig(queue=2)
    with notebooks(config, workers=1) as (address, notebook), httpx.Client(base_url=address, timeout=30) as client:

        def slow(name: str) -> httpx.Response:
            return client.post(PATH, json=action(name, tool_call("note", line=name, seconds=3)))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            taken = [pool.submit(slow, name) for name in "abc"]
            assert eventually(lambda: client.get("/health").json()["queue"] == 2)
            refused = slow("d")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert figures(client)["hdpo_tools_queue_length"] == 2
            # A trajectory in a long line of its own calls fills it just as well.
            assert slow("a").status_code == 429
            assert [future.result().status_code for future in taken] == [200] * 3
        both = {"trajectory_ids": list("wxyz"), "actions": [tool_call("note", line=name) for name in "wxyz"]}
        assert refusal(client, both, 429) == "0 calls are waiting already, and there is room for 3 more"
        assert sorted(notebook.written) == ["a", "b", "c"]
        assert figures(client)["hdpo_tools_rejected_total busy"] == 3


def test_trajectories_at_a_time_are_bounded():
    with notebooks(ToolServerConfig(sessions=2)) as (address, _), httpx.Client(base_url=address) as client:
        for name in "ab":
            ask(client, action(name, tool_call("note", line="x")))
        assert refusal(client, action("c", tool_call("note", line="x")), 429) == "2 trajectories are open already"
        assert text(ask(client, action("a", tool_call("note", line="y")))) == "0 images: x y"
        ask(client, over("b"))
        assert text(ask(client, action("c", tool_call("note", line="x")))) == "0 images: x"


def test_idle_trajectories_are_freed_and_calls_keep_them():
    with notebooks(ToolServerConfig(idle_seconds=1.0)) as (address, notebook), httpx.Client(base_url=address) as client:
        assert text(ask(client, action("t", tool_call("note", line="a", seconds=2.5)))) == "0 images: a"
        assert notebook.open_now == 1
        assert eventually(lambda: notebook.open_now == 0)
        assert text(ask(client, action("t", tool_call("note", line="b")))) == "0 images: b"


def test_a_call_that_never_answers_is_given_up_and_its_worker_replaced():
    config = ToolServerConfig(call_seconds=0.5)
    with notebooks(config, workers=1) as (address, _), httpx.Client(base_url=address) as client:
        ask(client, action("t", tool_call("note", line="a")))
        (observation,) = ask(client, action("t", tool_call("note", line="b", seconds=20)))["observations"]
        assert observation["timeout"] is True and "did not answer within 0.5 s; its state is lost" in observation["obs"]
        assert text(ask(client, action("t", tool_call("note", line="c")))) == "0 images: c"


def test_a_repeated_call_runs_once_and_is_answered_as_the_first_time(server):
    client, notebook = server
    first = action("t", tool_call("note", line="a", seconds=0.5, pictures=1), call_ids=["1"])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(client, first), range(4)))
    answers.append(ask(client, first))
    for answer in answers:
        assert answer["observations"] == answers[0]["observations"]
    # Not even where the text differs: the name says what it is.
    assert text(ask(client, action("t", tool_call("note", line="other"), call_ids=["1"]))) == "0 images: a"
    assert text(ask(client, action("t", tool_call("note", line="b"), call_ids=["2"]))) == "0 images: a b"
    assert text(ask(client, action("u", tool_call("note", line="c"), call_ids=["1"]))) == "0 images: c"
    for _ in range(2):
        ask(client, action("v", tool_call("note", line="unnamed")))
    assert notebook.written == ["a", "b", "c", "unnamed", "unnamed"]
    ask(client, over("t"))
    assert text(ask(client, action("t", tool_call("note", line="d"), call_ids=["1"]))) == "0 images: d"


def test_answers_are_kept_within_bounds():
    with notebooks(ToolServerConfig(answers_mb=0)) as (address, notebook), httpx.Client(base_url=address) as client:
        asked = action("t", tool_call("note", line="a"), call_ids=["1"])
        first, again = (text(ask(client, asked)) for _ in range(2))
        assert first == "0 images: a" and "its answer is not kept any more" in again
        assert text(ask(client, action("t", tool_call("note", line="b"), call_ids=["2"]))) == "0 images: a b"
        assert notebook.written == ["a", "b"]  # once each, whatever is kept


def test_a_trajectory_that_is_not_known_any_more_says_so_and_runs_nothing(server):
    client, notebook = server
    body = action("t", tool_call("note", line="a"))
    body["extra_fields"][0]["opened"] = True
    (observation,) = ask(client, body)["observations"]
    assert observation["metrics"]["lost"] is True and "all variables are lost" in observation["obs"]
    assert notebook.written == [] and client.get("/health").json()["sessions"] == 0


def test_a_client_that_goes_away_takes_its_waiting_calls_along():
    with notebooks(workers=1) as (address, notebook), httpx.Client(base_url=address, timeout=30) as client:
        host, port = address.removeprefix("http://").split(":")

        def send_and_leave(name: str, **fields: Any) -> None:
            content = json.dumps(action(name, tool_call("note", line=name, seconds=0.6), **fields)).encode()
            with socket.create_connection((host, int(port))) as connection:
                head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
                connection.sendall(head.encode() + content)
                time.sleep(0.2)

        send_and_leave("running")
        send_and_leave("waiting")
        send_and_leave("named", call_ids=["1"])
        assert eventually(lambda: notebook.written == ["running", "named"])
        assert client.get("/health").json()["queue"] == 0
        # What ran is there for the one that asks again.
        again = action("named", tool_call("note", line="named"), call_ids=["1"])
        assert text(ask(client, again)) == "0 images: named"
        assert notebook.written == ["running", "named"]


def test_metrics_name_only_what_is_ours(server):
    client, _ = server
    for name in ("note", "hostile_name"):
        ask(client, action("t", tool_call(name, line="a")))
    counted = figures(client)
    assert counted["hdpo_tools_requests_total 200"] == 2
    assert counted["hdpo_tools_calls_total note ok"] == counted["hdpo_tools_calls_total unknown invalid"] == 1
    assert counted["hdpo_tools_call_seconds_count note"] == 1
    assert counted["hdpo_tools_sessions_open"] == 1 and counted["hdpo_tools_queue_length"] == 0
    assert "hostile" not in client.get("/metrics").text


def test_lone_surrogates_are_sent_as_question_marks(server):
    client, _ = server
    turn = '<tool_call>{"name": "note", "arguments": {"line": "\\ud800"}}</tool_call>'
    assert text(ask(client, action("t", turn))) == "0 images: ?"


def test_slow_ends_of_one_do_not_hold_up_another(server):
    """Finishing waits for the trajectory's own call, and for nothing else."""
    client, notebook = server
    thread = threading.Thread(target=ask, args=(client, action("t", tool_call("note", line="a", seconds=3))))
    thread.start()
    assert eventually(lambda: notebook.written == ["a"])
    started = time.monotonic()
    ask(client, over("u"))
    assert time.monotonic() - started < 2
    ask(client, over("t"))
    assert notebook.open_now == 0 and time.monotonic() - started > 2
    thread.join()
