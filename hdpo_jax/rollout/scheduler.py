"""What the device does next: which strands run in slots, which pages they hold, what is computed in between.

Plain data and no clock: what a plan says depends on what was sampled and answered before, and never changes what a
trajectory becomes, only when.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.engine import Chunk, Copies, Extension, Running
from hdpo_jax.rollout.pages import PagePool
from hdpo_jax.rollout.sampling import OwnSampling
from hdpo_jax.rollout.stats import RolloutStats
from hdpo_jax.rollout.strands import Piece, Strand
from models.policy import PolicyConfig
from models.qwen3_vl import SharedPages
from models.qwen3_vl.images import pack_images

SHARERS = 4
"""Trajectories that look at a page of their prompt at a time: more would stand empty where fewer go on."""


class Round(NamedTuple):
    """Programs to run, in this order; None: not this time."""

    extensions: Sequence[Extension | None]
    """One for each of `config.shapes`."""
    copies: Copies | None
    running: Running | None

    @classmethod
    def of(cls, programs: Sequence[Any]) -> "Round":
        """The round with these `programs`."""
        *extensions, copies, running = programs
        return cls(extensions, copies, running)

    @property
    def programs(self) -> list[Extension | Copies | Running | None]:
        return [*self.extensions, self.copies, self.running]


class Sampled(NamedTuple):
    """What a strand's slot sampled in a chunk."""

    strand: Strand
    tokens: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]
    ended: bool
    forced: bool
    """The last token was written, not sampled."""


class _Family:
    """A prompt, and the trajectories that are to go on from it."""

    def __init__(self, prompt: Strand, members: Sequence[Strand]):
        self.prompt = prompt
        self.members = deque(members)


class _Lane:
    """Slots and pages of one part of the mesh."""

    def __init__(self, slots: int, pages: int):
        self.pool = PagePool(pages)
        self.free = list(range(slots))[::-1]
        self.running: dict[int, Strand] = {}
        """Strands by slot, the longest in a slot first."""
        self.ready: deque[Strand] = deque()
        """Complete, and waiting for a slot."""
        self.missing: deque[Strand] = deque()
        """Trajectories of which something is to be computed first."""
        self.paused: dict[Strand, None] = {}
        """Waiting for a tool, the longest first."""
        self.families: deque[_Family] = deque()

    @property
    def coming(self) -> int:
        """Trajectories that will be in a slot as soon as there is one, or as what they miss is computed."""
        return len(self.ready) + len(self.missing) + sum(len(family.members) for family in self.families)

    @property
    def complete(self) -> int:
        """Trajectories that need nothing but a slot."""
        return len(self.ready) + sum(len(family.members) for family in self.families if family.prompt.complete)

    @property
    def wanted(self) -> int:
        """Slots that nothing is on its way to; less than 0: trajectories that wait for one."""
        return len(self.free) - self.coming

    def leave(self, strand: Strand) -> None:
        """Frees the strand's slot."""
        slot = next(slot for slot, running in self.running.items() if running is strand)
        del self.running[slot]
        self.free.append(slot)

    def queue(self, strand: Strand) -> None:
        """A trajectory waits for a slot, or for what it misses."""
        (self.ready if strand.complete else self.missing).append(strand)

    def drop_pages(self, strand: Strand) -> None:
        self.pool.drop(strand.pages)
        strand.forget()


class Scheduler:
    """Strands in slots, pages and batches. Lanes share nothing: each has its slots and its pages."""

    def __init__(self, config: RolloutConfig, model: PolicyConfig, *, lanes: int, recent: int, own: bool = False):
        """`recent`: how many of a turn's last tokens the decoder is told. `own`: strands say how they are sampled."""
        self._own = own
        self._config = config
        self._model = model
        self._recent = recent
        self._slots = -(-config.slots // lanes)
        self._rows = [max(1, rows // lanes) for rows, _, _ in config.shapes]
        sizes = [size for _, *size in config.shapes]
        self._same_size = [[shape for shape, other in enumerate(sizes) if other == size] for size in sizes]
        self._lanes = [_Lane(self._slots, config.pages_per_lane(lanes)) for _ in range(lanes)]
        self._lane_of: dict[Strand, _Lane] = {}
        self._computing: list[tuple[Strand, Piece, int]] = []
        """What the extensions of the last round compute, and in which row."""
        self.stats = RolloutStats()

    # What the agent says

    @property
    def running(self) -> int:
        return sum(len(lane.running) for lane in self._lanes)

    @property
    def coming(self) -> int:
        """Trajectories that will run as soon as there is a slot, or as what they miss is computed."""
        return sum(lane.coming for lane in self._lanes)

    def open(self, prompt: Strand, members: Sequence[Strand]) -> None:
        """A prompt is to be computed, once a lane, and trajectories to go on from it."""
        shares: list[list[Strand]] = [[] for _ in self._lanes]
        # As many as fill a lane go to the one where most slots are wanted, the next ones on from there.
        for first in range(0, len(members), self._slots):
            wanted = [lane.wanted - len(share) for lane, share in zip(self._lanes, shares, strict=True)]
            shares[wanted.index(max(wanted))] += members[first : first + self._slots]
        for lane, share in zip(self._lanes, shares, strict=True):
            if share:
                lane.families.append(_Family(Strand(prompt.token_ids, prompt.images, prompt.positions), share))
                self._lane_of |= dict.fromkeys(share, lane)

    def pause(self, strand: Strand) -> None:
        """A strand that has stopped waits for a tool: its slot is free, its pages stay."""
        lane = self._lane_of[strand]
        lane.leave(strand)
        lane.paused[strand] = None

    def resume(self, strand: Strand) -> None:
        """A paused strand goes on, with what was appended to it."""
        lane = self._lane_of[strand]
        del lane.paused[strand]
        lane.queue(strand)

    def close(self, strand: Strand) -> None:
        """A strand that has stopped, or that is paused, is done with: slot and pages are free."""
        lane = self._lane_of.pop(strand)
        if strand in lane.paused:
            del lane.paused[strand]
        else:
            lane.leave(strand)
        lane.drop_pages(strand)

    def abandon(self, strand: Strand) -> None:
        """A strand is done with, wherever it is: in a slot, on its way there, or waiting."""
        lane = self._lane_of[strand]
        if strand in lane.paused or strand in lane.running.values():
            return self.close(strand)
        del self._lane_of[strand]
        for queue in (lane.ready, lane.missing, *(family.members for family in lane.families)):
            if strand in queue:
                queue.remove(strand)
        for family in [family for family in lane.families if not family.members]:
            lane.families.remove(family)
            lane.drop_pages(family.prompt)
        lane.drop_pages(strand)

    # What the device did

    def record(self, experts: Sequence[Int[np.ndarray, "rows tokens layers chosen"] | None]) -> None:
        """Adds what the extensions of the last round told to the strands."""
        for strand, piece, row in self._computing:
            found = experts[piece.shape]
            if found is not None:
                strand.record(piece.begin, found[row, : piece.end - piece.begin])

    def take(self, chunk: Chunk) -> Iterator[Sampled]:
        """Adds what was sampled to the strands; those that `ended` are to be paused or closed."""
        for number, lane in enumerate(self._lanes):
            for slot, strand in list(lane.running.items()):
                at = number * self._slots + slot
                count = int(chunk.counts[at])
                sampled = Sampled(
                    strand,
                    chunk.tokens[at, :count].tolist(),
                    chunk.logprobs[at, :count].tolist(),
                    chunk.sampled_logprobs[at, :count].tolist(),
                    bool(chunk.ended[at]),
                    bool(chunk.forced[at]),
                )
                if chunk.experts is not None:
                    strand.record(strand.cached, chunk.experts[at, :count])
                strand.token_ids.extend(sampled.tokens)
                strand.cached += count
                yield sampled

    # What it does next

    def empty_round(self) -> Round:
        """Every program once, with nothing to do: for compiling them."""
        nobody: list[list] = [[] for _ in self._lanes]
        extensions = [self._extension(shape, nobody) for shape in range(len(self._config.shapes))]
        return Round(extensions, self._empty_copies(), self._slots_as_arrays())

    def plan(self) -> Round:
        self._computing = []
        # In this order, for pages change hands: what is extended and copied is computed before anything decodes.
        extensions = self._extensions()
        copies = self._fill_slots()
        computing = any(extension is not None for extension in extensions)
        running = None if computing and self._better_filled_first() else self._running()
        self.stats.peak_pages = sum(lane.pool.peak for lane in self._lanes)
        return Round(extensions, copies, running)

    def _better_filled_first(self) -> bool:
        """Whether too many slots would stand idle in a chunk that the next extension could fill."""
        idle = sum(len(lane.free) for lane in self._lanes if lane.missing or lane.families)
        return idle > self._config.return_early * self._config.slots

    # Parts of strands that are not in the cache yet

    def _extensions(self) -> list[Extension | None]:
        batches = [[[] for _ in self._lanes] for _ in self._config.shapes]
        for number, lane in enumerate(self._lanes):
            planned: set[Strand] = set()
            for strand in self._incomplete(lane):
                piece = strand.next_piece(self._config.shapes, self._model)
                batch = batches[piece.shape][number]
                if len(batch) < self._most_rows(piece.shape) and self._make_room(lane, strand, piece, planned):
                    batch.append((strand, piece))
                    planned.add(strand)
        hungry = any(len(lane.free) > lane.complete for lane in self._lanes)
        extensions: list[Extension | None] = [None for _ in batches]
        for first, batch in enumerate(batches):
            rows = max(map(len, batch))
            if rows and (hungry or rows == self._most_rows(first)):
                shape = next(shape for shape in self._same_size[first] if self._rows[shape] >= rows)
                extensions[shape] = self._extension(shape, batch)
        return extensions

    def _most_rows(self, first: int) -> int:
        """Of the shapes of one size; pieces name the `first` of them."""
        return max(self._rows[shape] for shape in self._same_size[first])

    def _incomplete(self, lane: _Lane) -> list[Strand]:
        return [*lane.missing, *(family.prompt for family in lane.families if not family.prompt.complete)]

    def _make_room(self, lane: _Lane, strand: Strand, piece: Piece, planned: set[Strand]) -> bool:
        """Pages for a piece. A strand whose beginning is not there either waits until there is room for all of it.

        Others are evicted for it only where nothing else is under way in the lane.
        """
        needed = self._pages_for(piece.end) - len(strand.pages)
        wanted = needed if strand.cached else self._pages_for(strand.length + self._config.chunk) - len(strand.pages)
        while lane.pool.free < wanted:
            if lane.running or lane.ready or planned or not self._evict(lane, sparing=strand):
                return False
        strand.pages += lane.pool.take(max(needed, 0)) or []
        return True

    def _extension(self, shape: int, batch: Sequence[Sequence[tuple[Strand, Piece]]]) -> Extension:
        _, tokens, patches = self._config.shapes[shape]
        rows = self._rows[shape] * len(self._lanes)
        token_ids, positions = np.zeros((rows, tokens), np.int32), np.zeros((rows, tokens, 3), np.int32)
        feature_index = np.full((rows, tokens), -1, np.int32)
        start, table = np.zeros(rows, np.int32), self._empty_table(rows)
        images: list[list] = [[] for _ in range(rows)]
        for number, members in enumerate(batch):
            for row, (strand, piece) in enumerate(members, start=number * self._rows[shape]):
                inputs, count = strand.inputs(piece, self._model), piece.end - piece.begin
                token_ids[row, :count] = inputs.token_ids
                positions[row, :count] = inputs.positions
                feature_index[row, :count] = inputs.feature_index
                images[row] = inputs.images
                start[row] = piece.begin
                table[row, : len(strand.pages)] = strand.pages
                self._computing.append((strand, piece._replace(shape=shape), row))
                self._computed(self._lanes[number], strand, piece)
        packed = pack_images(self._model, images, feature_index, patches) if patches and self._model.vision else None
        arrays: list[Any] = [table, token_ids, positions, start, packed]
        return Extension(*arrays)

    def _computed(self, lane: _Lane, strand: Strand, piece: Piece) -> None:
        strand.cached = piece.end
        self.stats.computed_tokens += piece.end - piece.begin
        if strand.complete and strand in lane.missing:
            lane.missing.remove(strand)
            lane.ready.append(strand)

    # Slots

    def _fill_slots(self) -> Copies | None:
        copied = False
        copies = self._empty_copies()
        for number, lane in enumerate(self._lanes):
            pairs: list[tuple[int, int]] = []
            while lane.free and (strand := self._fork(lane, pairs) or (lane.ready.popleft() if lane.ready else None)):
                lane.running[lane.free.pop()] = strand
            for place, pair in enumerate(pairs):
                copies.source[number, place], copies.target[number, place] = pair
                copied = True
        return copies if copied else None

    def _empty_copies(self) -> Copies:
        arrays: Any = np.zeros((2, len(self._lanes), self._slots), np.int32)
        return Copies(*arrays)

    def _fork(self, lane: _Lane, pairs: list[tuple[int, int]]) -> Strand | None:
        """The next trajectory of a computed prompt, where there is one; adds the page to copy to `pairs`.

        It goes before those that have been in a slot already: what begins late may still be long, and ends alone.

        Full pages are shared, the last one is copied if it is in part the trajectory's. The last trajectory takes over
        the prompt's own pages.
        """
        family = next((family for family in lane.families if family.prompt.complete), None)
        if family is None:
            return None
        prompt, strand = family.prompt, family.members[0]
        full = prompt.cached // self._config.page
        if len(family.members) == 1:
            strand.pages = prompt.pages
            lane.families.remove(family)
        else:
            own = lane.pool.take(len(prompt.pages) - full)
            if own is None and not lane.running and not lane.ready and self._evict(lane, sparing=prompt):
                return self._fork(lane, pairs)
            if own is None:
                return None
            pairs += zip(prompt.pages[full:], own, strict=True)
            lane.pool.share(prompt.pages[:full])
            strand.pages = prompt.pages[:full] + own
        strand.cached, strand.begun = prompt.cached, prompt
        return family.members.popleft()

    def _running(self) -> Running | None:
        for lane in self._lanes:
            self._grow(lane)
        return self._slots_as_arrays() if self.running else None

    def _slots_as_arrays(self) -> Running:
        slots = self._slots * len(self._lanes)
        pending, length, limit, offset = np.ones((4, slots), np.int32)
        table, identity = self._empty_table(slots), np.zeros((slots, 3), np.int32)
        recent, active = np.full((slots, self._recent), -1, np.int32), np.zeros(slots, bool)
        shared = [self._shared_pages(lane) for lane in self._lanes]
        for number, lane in enumerate(self._lanes):
            for slot, strand in lane.running.items():
                at = number * self._slots + slot
                pending[at], length[at], limit[at] = strand.token_ids[-1], strand.length, strand.limit
                offset[at], identity[at], active[at] = strand.offset, strand.identity, True
                table[at, : len(strand.pages)] = strand.pages
                turn = strand.token_ids[strand.turn_start :][-self._recent :] if self._recent else []
                recent[at, self._recent - len(turn) :] = turn
        together: Any = (np.concatenate(part) for part in zip(*shared, strict=True))
        arrays: list[Any] = [table, pending, length, limit, offset, identity, recent, active]
        return Running(*arrays, shared=SharedPages(*together), own=self._own_sampling() if self._own else None)

    def _own_sampling(self) -> OwnSampling:
        slots = self._slots * len(self._lanes)
        temperature, top_p, min_p = np.ones(slots, np.float32), np.ones(slots, np.float32), np.zeros(slots, np.float32)
        arrays: Any = temperature, np.zeros(slots, np.int32), top_p, min_p
        for number, lane in enumerate(self._lanes):
            for slot, strand in lane.running.items():
                for array, value in zip(arrays, strand.own or (), strict=True):
                    array[number * self._slots + slot] = value
        return OwnSampling(*arrays)

    def _shared_pages(self, lane: _Lane) -> SharedPages:
        """Strands with the same prompt pages in groups; one that was evicted has pages of its own, as many."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for slot, strand in lane.running.items():
            groups.setdefault(tuple(strand.pages[: strand.prompt // self._config.page]), []).append(slot)
        members = np.zeros((self._slots, SHARERS), np.int32)
        place, pages = np.zeros((2, self._slots), np.int32)
        number = 0
        for shared, slots in groups.items():
            for first in range(0, len(slots), SHARERS):
                part = slots[first : first + SHARERS]
                members[number, : len(part)] = part
                place[part], pages[part] = number * SHARERS + np.arange(len(part)), len(shared)
                number += 1
        arrays: Any = members, place, pages
        return SharedPages(*arrays)

    def _grow(self, lane: _Lane) -> None:
        """Pages for what the strands in slots may sample in a chunk; the longest in a slot first."""
        for strand in list(lane.running.values()):
            needed = self._pages_for(min(strand.length + self._config.chunk, strand.limit)) - len(strand.pages)
            while strand in lane.running.values():
                pages = lane.pool.take(max(needed, 0))
                if pages is not None:
                    strand.pages += pages
                    break
                evicted = self._evict(lane, sparing=strand) or self._evict(lane)
                assert evicted, "a lane's pages do not hold one trajectory"  # checked by RolloutConfig

    def _evict(self, lane: _Lane, sparing: Strand | None = None) -> bool:
        """Takes the pages of the strand that is missed least; it is computed anew when its turn comes.

        First what has waited longest for a tool, then prompts, then what came last into a slot.
        """
        prompts = [family.prompt for family in lane.families]
        latest_first = [*lane.missing][::-1] + [*lane.ready][::-1] + [*lane.running.values()][::-1]
        for strand in [*lane.paused, *prompts, *latest_first]:
            if not strand.pages or strand is sparing:
                continue
            went_on = strand in lane.ready or strand in lane.running.values()
            if strand in lane.ready:
                lane.ready.remove(strand)
            elif went_on:
                lane.leave(strand)
            lane.drop_pages(strand)
            if went_on:  # ready again at once if it is of a single token, which needs no page
                lane.queue(strand)
            self.stats.evictions += 1
            return True
        return False

    def _pages_for(self, tokens: int) -> int:
        return -(-min(tokens, self._config.capacity) // self._config.page)

    def _empty_table(self, rows: int) -> np.ndarray:
        return np.zeros((rows, self._pages_for(self._config.capacity)), np.int32)
