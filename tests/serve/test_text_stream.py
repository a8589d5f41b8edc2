"""Whole characters, and no part of a stop sequence."""

import random

import pytest

from hdpo_jax.serve.text_stream import TextStream

WORDS = "naïve 🙂 — 学習 and Ω ▁ e\u0301 plain"


def decode(ids):
    """One byte a token, as in the worst case."""
    return bytes(ids).decode("utf-8", "replace")


def streamed(text: str, sizes, stops=()) -> tuple[list[str], TextStream]:
    stream, data, parts = TextStream(decode, stops), list(text.encode()), []
    while data:
        size = next(sizes)
        parts.append(stream.add(data[:size]))
        data = data[size:]
    return [*parts, stream.end()], stream


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_characters_come_whole_and_none_is_lost(size):
    parts, _ = streamed(WORDS, iter(lambda: size, None))
    assert "".join(parts) == WORDS
    assert not any("\ufffd" in part for part in parts)


def test_text_comes_as_soon_as_it_is_certain():
    stream = TextStream(decode)
    assert stream.add(b"ab") == "ab"
    assert stream.add(b"c\xf0\x9f") == "c"  # the beginning of a character waits, what stands before it does not
    assert stream.add(b"\x99\x82!") == "🙂!"


def test_bytes_that_are_no_character_are_shown_as_such_and_hold_nothing_up():
    parts, _ = streamed("", iter([1]))
    stream = TextStream(decode)
    text = "".join(stream.add([byte]) for byte in b"\xff\xff\xff\xff\xff\xffabc") + stream.end()
    assert text == "\ufffd" * 6 + "abc" and parts == [""]


def test_a_stop_sequence_ends_the_text_before_it_wherever_tokens_end():
    rng = random.Random(0)
    for _ in range(200):
        parts, stream = streamed("say 学END more", iter(lambda: rng.randint(1, 4), None), stops=("END", "never"))
        assert "".join(parts) == "say 学" and stream.stopped


def test_what_only_looks_like_a_stop_sequence_is_said_in_the_end():
    parts, stream = streamed("a EN EEN EN", iter(lambda: 1, None), stops=("END",))
    assert "".join(parts) == "a EN EEN EN" and not stream.stopped
    assert parts[2] == "" and parts[4] == "EN "  # "E" and "EN" waited for what follows


def test_the_first_of_several_stop_sequences_counts():
    parts, _ = streamed("one two three", iter(lambda: 100, None), stops=("three", "two"))
    assert "".join(parts) == "one "
