"""`hdpo serve` through the official client: many at a time, none lost, none mixed up."""

import asyncio
import base64
import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from PIL import Image

from tests.serve.parrot import write_parrot
from tests.serve.servers import Served, serving, started
from tests.small_signs import write_small_signs

pytestmark = pytest.mark.slow

CALL = '<reason>look</reason><tool_call>{"name": "python", "arguments": {"code": "image_1.size"}}</tool_call>'
SECRET = "correct-horse"
PYTHON: Any = {"type": "function", "function": {"name": "python", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    write_small_signs(directory, conversations=48, boards=8)
    with serving(directory / "model") as server:
        yield server


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot") / "model", CALL)


@pytest.fixture(scope="module")
def talker(parrot) -> Iterator[Served]:
    """The parrot, for those who know the secret."""
    with serving(parrot, env={"HDPO_SERVE_TOKEN": SECRET}) as server:
        yield server


def picture(number: int) -> dict:
    """Images of many shapes and colours."""
    size = (16 + 8 * (number % 9), 16 + 8 * (number % 5))
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 13 % 256))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def question(number: int) -> list:
    parts = [picture(number * 3 + place) for place in range(number % 3)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": f"what is number {number}?"}]}]


def asked(number: int, **more) -> dict:
    return {"model": "tiny", "messages": question(number), "seed": number, "max_tokens": 8 + number % 17} | more


def test_models(server):
    models = server.client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        server.client.chat.completions.create(**asked(0, model="gpt-7"))


def test_an_answer(server):
    answer = server.client.chat.completions.create(**asked(1, max_tokens=12, logprobs=True))
    choice = answer.choices[0]
    assert choice.finish_reason in ("length", "stop") and choice.message.role == "assistant"
    assert answer.usage is not None and choice.logprobs is not None and choice.logprobs.content is not None
    assert answer.usage.completion_tokens == len(choice.logprobs.content) <= 12
    assert "".join(entry.token for entry in choice.logprobs.content).startswith(choice.message.content or "")
    assert all(entry.logprob <= 0 for entry in choice.logprobs.content)
    assert answer.usage.prompt_tokens > 10


def test_the_same_seed_says_the_same_and_another_one_does_not(server):
    def said(**more):
        return server.client.chat.completions.create(**asked(2, max_tokens=16, **more)).choices[0].message.content

    assert said(seed=5) == said(seed=5) != said(seed=6)
    assert said(temperature=0, seed=1) == said(temperature=0, seed=2)
    assert said(top_p=1e-6, seed=1) == said(temperature=0)
    assert said(extra_body={"top_k": 1}, seed=3) == said(temperature=0)
    assert said(temperature=1e-30, seed=4) == said(temperature=0)  # whose logits would be no numbers


def test_a_stream_says_the_same_in_parts(server):
    whole = server.client.chat.completions.create(**asked(3, max_tokens=24, logprobs=True))
    stream = server.client.chat.completions.create(
        **asked(3, max_tokens=24, logprobs=True, stream=True, stream_options={"include_usage": True})
    )
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    tokens = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    expected = whole.choices[0]
    assert text == expected.message.content and expected.logprobs is not None
    assert [entry.token for entry in tokens] == [entry.token for entry in expected.logprobs.content or []]
    assert len(choices) > 4 and choices[-1].finish_reason == expected.finish_reason
    assert chunks[-1].usage == whole.usage


def test_several_choices(server):
    answer = server.client.chat.completions.create(**asked(4, n=3, max_tokens=20))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    alone = server.client.chat.completions.create(**asked(4, max_tokens=20))
    assert alone.choices[0].message.content == answer.choices[0].message.content


def test_a_stop_sequence_ends_the_answer_before_it(server):
    whole = server.client.chat.completions.create(**asked(5, max_tokens=40)).choices[0].message.content
    assert whole and len(whole) > 20
    stop = whole[10:13]
    cut = server.client.chat.completions.create(**asked(5, max_tokens=40, stop=[stop, "\x00never"])).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_sixty_four_clients_at_once_are_told_what_each_is_told_alone(server):
    """Images of many shapes and none, streams and not, of several lengths; with more of them than slots."""

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    async def one(client: AsyncOpenAI, number: int) -> str:
        if number % 2:
            answer = await client.chat.completions.create(**asked(number))
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(**asked(number), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    together = asyncio.run(all_at_once())
    assert len(set(together)) > 56  # random weights say something else to each
    for number in range(0, 64, 5):
        alone = server.client.chat.completions.create(**asked(number)).choices[0].message.content
        assert together[number] == alone


def test_who_goes_away_frees_the_slot(server):
    def counts() -> dict:
        return httpx.get(f"{server.url}/health").json()

    async def leave_early() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**asked(6, max_tokens=250, n=16), stream=True)
            await anext(aiter(stream))
            waiting = asyncio.create_task(client.chat.completions.create(**asked(7, max_tokens=250, n=16)))
            await asyncio.sleep(0.3)
            assert counts()["running"] > 0
            waiting.cancel()
            await stream.close()

    asyncio.run(leave_early())
    until = time.monotonic() + 20
    while counts()["running"] + counts()["waiting"] and time.monotonic() < until:
        time.sleep(0.05)
    assert counts() == {"status": "ready", "running": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "tokens; expected at most"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a content part of type 'audio'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
            "expected a data URI",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
            "image",
        ),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"temperature": 1000}, "temperature"),
        ({"messages": []}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_answered_is_refused_in_one_line(server, change, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        server.client.chat.completions.create(**asked(8) | change)
    assert isinstance(refused.value.body, dict) and "\n" not in refused.value.body["message"]
    assert len(refused.value.body["message"]) < 600


def test_calls_of_the_clients_tools_are_told_apart(talker):
    client = talker.client.with_options(api_key=SECRET)
    ask: Any = {"model": "tiny", "messages": question(0), "max_tokens": 100}
    plain = client.chat.completions.create(**ask).choices[0]
    assert plain.message.content == CALL and plain.finish_reason == "stop" and not plain.message.tool_calls
    called = client.chat.completions.create(**ask, tools=[PYTHON]).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content == "<reason>look</reason>"
    calls = called.message.tool_calls or []
    expected = {"name": "python", "arguments": '{"code": "image_1.size"}'}
    assert [call.to_dict()["function"] for call in calls] == [expected]
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, tools=[PYTHON], stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == "<reason>look</reason>"
    streamed = [call for part in parts for call in part.delta.tool_calls or []]
    assert [call.function.arguments for call in streamed if call.function] == ['{"code": "image_1.size"}']
    assert parts[-1].finish_reason == "tool_calls"


@pytest.mark.requires_bwrap
def test_an_agent_runs_its_tools_here(parrot):
    """The parrot calls in every turn: two calls are run, the third is one too many."""
    flags = ("--agent", "--agent.max-calls", "2", "--agent.max-observation-tokens", "100")
    with serving(parrot, *flags, capacity=1_200) as server:
        ask = {"model": "tiny", "messages": question(1), "max_tokens": 300}
        choice = server.client.chat.completions.create(**ask).choices[0]
        turns = (choice.message.model_extra or {})["turns"]
        shown = "(40, 40)"  # the picture's size, which only the sandbox knows
        assert [turn["role"] for turn in turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
        assert [turn["content"] for turn in turns if turn["role"] == "tool"] == [shown] * 2
        assert choice.message.content == CALL and choice.finish_reason == "length"
        parts = [chunk.choices[0].delta for chunk in server.client.chat.completions.create(**ask, stream=True)]
        thoughts = [(part.model_extra or {}).get("reasoning_content") for part in parts]
        assert list(filter(None, thoughts)) == [CALL, shown, CALL, shown]
        assert "".join(part.content or "" for part in parts) == CALL


def test_sigterm_lets_answers_end_and_a_token_keeps_strangers_out(talker):
    with pytest.raises(openai.AuthenticationError):
        talker.client.models.list()
    client = talker.client.with_options(api_key=SECRET)
    stream = client.chat.completions.create(model="tiny", messages=question(0), max_tokens=200, n=8, stream=True)
    next(stream)
    talker.process.send_signal(signal.SIGTERM)
    ends = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices[0].finish_reason]
    assert ends == ["stop"] * 8
    assert talker.process.wait(30) == 0


def test_beyond_this_machine_a_secret_is_needed(parrot):
    with started(("serve", "--model", str(parrot), "--host", "0.0.0.0", "--port", "0")) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and said.count("\n") == 1
    assert "HDPO_SERVE_TOKEN is not set" in said
