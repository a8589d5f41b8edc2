"""What a follower tells of a trajectory."""

import numpy as np

from hdpo_jax.rollout.scheduler import Sampled
from hdpo_jax.rollout.strands import Strand
from hdpo_jax.serve.exchange import LARGEST_SEED, LARGEST_TOP_K, Follower, Told, Wish
from hdpo_jax.serve.text_stream import TextStream
from hdpo_jax.types import Turn


def sampled(text: str) -> Sampled:
    tokens = list(text.encode())
    strand = Strand([], [], np.zeros((0, 3), np.int32))
    return Sampled(strand, tokens, [0.0] * len(tokens), [0.0] * len(tokens), False, False)


def follower(*stops: str) -> tuple[Follower, list[Told]]:
    told: list[Told] = []
    return Follower(0, lambda: TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), stops), told.append), told


def test_a_call_that_is_held_back_is_void():
    """Neither its text nor a stop sequence in it is in the turn that comes of it."""
    one, told = follower("END")
    assert not one.sampled(sampled("<reason>x</reason><tool_call>EN"))
    one.rewound("<reason>x</reason><answer>")
    assert told[-1].rewound == "<reason>x</reason><answer>"
    assert not one.sampled(sampled("Dora"))  # no END: its beginning was in the call
    assert one.sampled(sampled(" END of it"))
    one.turned(Turn(role="assistant", text="whatever the ids say"))
    assert told[-1].turn == Turn(role="assistant", text="<reason>x</reason><answer>Dora ")


def test_what_reaches_the_engine_fits_its_arrays():
    wish = Wish(most_tokens=1, temperature=1e-30, top_k=3_000_000_000, top_p=1e-45, seed=3_000_000_000)
    assert wish.own.temperature == 0 and wish.own.top_k == LARGEST_TOP_K and wish.own.top_p > 0
    assert 0 <= wish.drawn_seed < LARGEST_SEED
    assert len({Wish(most_tokens=1).drawn_seed for _ in range(9)}) > 1
