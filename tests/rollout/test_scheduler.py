"""What a plan runs, from what there is to compute."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.engine import Chunk
from hdpo_jax.rollout.scheduler import SHARERS, Round, Scheduler
from hdpo_jax.rollout.strands import Strand
from tests.models.oracles import oracle


def prompt(tokens: int) -> Strand:
    return Strand([7] * tokens, [], np.arange(tokens, dtype=np.int32).repeat(3).reshape(-1, 3))


@pytest.mark.parametrize(("prompts", "expected"), [(1, [True, False, False]), (2, [False, True, False])])
def test_the_shape_with_the_fewest_rows_that_hold_the_batch_is_computed(prompts, expected):
    config = RolloutConfig(slots=8, capacity=32, page=4, shapes=((1, 16, 0), (4, 16, 0), (4, 32, 0)))
    scheduler = Scheduler(config, oracle("biased, untied").config, lanes=1, recent=0)
    for number in range(prompts):
        question = prompt(9)
        scheduler.open(question, [question.fork((0, number, 0), limit=32)])
    extensions = scheduler.plan().extensions
    assert [extension is not None for extension in extensions] == expected
    (extension,) = (extension for extension in extensions if extension is not None)
    assert (extension.table[:, 0] > 0).sum() == prompts


def members(question: Strand, count: int) -> list[Strand]:
    return [question.fork((0, 0, sample), limit=32) for sample in range(count)]


def extended(plan: Round) -> int:
    """Rows that a round computes."""
    return sum(int((extension.table[:, 0] > 0).sum()) for extension in plan.extensions if extension is not None)


def sampled(scheduler: Scheduler, plan: Round, counts: list[int], ended: list[bool]) -> list[Strand]:
    """What a chunk's worth of tokens does to the strands in slots; those that ended."""
    assert plan.running is not None
    slots = len(plan.running.pending)
    counts, flags = counts + [0] * (slots - len(counts)), np.array(ended + [False] * (slots - len(ended)))
    zeros = np.zeros((slots, CHUNK), np.float32)
    chunk = Chunk(np.array(counts), zeros.astype(int), zeros, zeros, flags, np.zeros(slots, bool), max(counts), None)
    return [each.strand for each in scheduler.take(chunk) if each.ended]


CHUNK = 4
CONFIG = RolloutConfig(slots=4, capacity=32, page=4, chunk=CHUNK, shapes=((4, 16, 0),))


def test_a_group_is_computed_once_a_lane():
    scheduler = Scheduler(CONFIG, oracle("biased, untied").config, lanes=2, recent=0)
    question = prompt(9)
    scheduler.open(question, members(question, 16))
    assert extended(scheduler.plan()) == 2
    for _ in range(4):  # as its trajectories come and go, two slots a lane
        plan = scheduler.plan()
        assert extended(plan) == 0
        for strand in sampled(scheduler, plan, [1] * 4, [True] * 4):
            scheduler.close(strand)


def test_slots_whose_prompt_is_the_same_are_told_which_pages_they_share():
    scheduler = Scheduler(replace(CONFIG, slots=8), oracle("biased, untied").config, lanes=1, recent=0)
    for count, tokens in ((SHARERS + 1, 11), (2, 6)):  # two full pages, and one; the rest is each slot's own
        question = prompt(tokens)
        scheduler.open(question, members(question, count))
    running = scheduler.plan().running
    assert running is not None and running.shared is not None and running.active.sum() == SHARERS + 3
    found = []
    for slot in np.flatnonzero(running.active):
        number, place = divmod(int(running.shared.place[slot]), SHARERS)
        assert running.shared.members[number, place] == slot
        pages = running.shared.pages[slot]
        leader = running.shared.members[number, 0]
        assert running.table[slot, :pages].tolist() == running.table[leader, :pages].tolist()
        assert pages == running.shared.pages[leader]
        found.append((number, int(pages)))
    assert sorted(Counter(found).values()) == [1, 2, SHARERS]
    assert sorted(pages for _, pages in found) == [1] * 2 + [2] * (SHARERS + 1)


def test_what_has_waited_longest_for_a_tool_is_evicted_first():
    """Three of four trajectories wait, and the one that goes on needs a page more than there are."""
    config = replace(CONFIG, pages=16, capacity=24)
    scheduler = Scheduler(config, oracle("biased, untied").config, lanes=1, recent=0)
    for number in range(4):
        question = prompt(9)
        scheduler.open(question, [question.fork((0, number, 0), limit=24)])
    plan = scheduler.plan()
    waiting = sampled(scheduler, plan, [3] * 4, [False, True, True, True])
    longest, *others = [waiting[1], waiting[0], waiting[2]]
    for strand in (longest, *others):
        scheduler.pause(strand)
    while not scheduler.stats.evictions:
        sampled(scheduler, scheduler.plan(), [CHUNK], [False])
    assert not longest.pages and all(strand.pages for strand in others)


def test_a_trajectory_of_one_token_may_be_evicted_before_it_has_sampled():
    scheduler = Scheduler(CONFIG, oracle("biased, untied").config, lanes=1, recent=0)
    question = prompt(1)
    scheduler.open(question, members(question, 1))
    scheduler.plan()
    (lane,) = scheduler._lanes
    assert scheduler._evict(lane)
    plan = scheduler.plan()
    assert extended(plan) == 0 and plan.running is not None and plan.running.active.sum() == 1


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_what_is_abandoned_leaves_nothing_behind_wherever_it_is(rounds):
    """Before its prompt is computed, in a slot, waiting for one, evicted or paused: in the end all pages are free."""
    scheduler = Scheduler(CONFIG, oracle("biased, untied").config, lanes=1, recent=0)
    question, other = prompt(9), prompt(13)
    strands = [*members(question, 6), *members(other, 2)]
    scheduler.open(question, strands[:6])
    scheduler.open(other, strands[6:])
    for number in range(rounds):
        plan = scheduler.plan()
        if plan.running is not None:
            ended = sampled(scheduler, plan, [1] * 4, [number == 1] * 4)
            for strand in ended[:2]:
                scheduler.pause(strand)
            for strand in ended[2:]:
                scheduler.close(strand)
                strands.remove(strand)
    for strand in strands:
        scheduler.abandon(strand)
    assert scheduler.running == scheduler.coming == 0
    (lane,) = scheduler._lanes
    assert lane.pool.free == CONFIG.pages_per_lane(1) - 1 and not lane.paused and not lane.families
    assert scheduler.plan().running is None
