"""Strands: rows of tokens whose keys and values are in the cache, or on their way there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from hdpo_jax.rollout.prompts import Question
from hdpo_jax.rollout.sampling import OwnSampling
from models.policy import PolicyConfig
from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import feature_indices, mrope_positions, placeholder_ids

Shape = tuple[int, int, int]
"""Static size of an extension: rows, tokens a row, image patches a row."""


class Piece(NamedTuple):
    """Part of a strand that one extension computes."""

    shape: int
    """Which of the static shapes holds it."""
    begin: int
    end: int


class PieceInputs(NamedTuple):
    token_ids: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, "tokens 3"]
    images: list[EncodedImage]
    feature_index: Int[np.ndarray, " tokens"]


@dataclass(eq=False)
class Strand:
    """A prompt, or a trajectory that goes on from one: exact ids and images, and the pages that hold them.

    All tokens but the last are to be in the cache before it can decode; the last is pending.
    """

    token_ids: list[int]
    images: list[EncodedImage]
    positions: Int[np.ndarray, "tokens 3"]
    """M-RoPE positions; those of tokens sampled since are left out, for they follow from `offset`."""
    limit: int = 0
    """Length at which its token budget is spent."""
    identity: tuple[int, int, int] = (0, 0, 0)
    """Step, prompt and sample number."""
    own: OwnSampling | None = None
    """How it is sampled, where trajectories differ in that; numbers in place of rows."""
    prompt: int = 0
    """Tokens that it has in common with the others of its group, and that were cached for all."""
    turn_start: int = 0
    """Where the turn begins that is being sampled."""
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens in the cache."""
    begun: "Strand | None" = None
    """The prompt from which it goes on, once that is computed."""
    recorded: list[Int[np.ndarray, "tokens layers chosen"]] = field(default_factory=list)
    """Experts of the tokens that were computed for it, behind its prompt; of each the first time."""
    _spans: list[tuple[int, int, int]] | None = None
    """Found once for every piece, until images are appended."""

    @classmethod
    def of(cls, question: Question) -> "Strand":
        return cls(question.token_ids.tolist(), list(question.images), question.positions)

    def fork(self, identity: tuple[int, int, int], limit: int, own: OwnSampling | None = None) -> "Strand":
        """A trajectory that goes on from this prompt; it has no pages yet."""
        length = self.length
        return Strand(
            list(self.token_ids), list(self.images), self.positions, limit, identity, own, length - 1, turn_start=length
        )

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        """Whether all that it needs to decode is in the cache."""
        return self.cached == self.length - 1

    @property
    def offset(self) -> int:
        """M-RoPE position minus index of the tokens sampled now."""
        return int(self.positions[-1, 0]) - (len(self.positions) - 1)

    @property
    def patches(self) -> int:
        return sum(len(image.patches) for image in self.images)

    def append(self, ids: Int[np.ndarray, " tokens"], images: list[EncodedImage], config: PolicyConfig) -> None:
        """Tokens that were not sampled, their images along: an observation."""
        self.token_ids.extend(ids.tolist())
        self.images.extend(images)
        grids = [image.grid for image in self.images]
        self.positions, _ = mrope_positions(np.asarray(self.token_ids), grids, config)
        self.turn_start = self.length
        self._spans = None

    def rewrite(self, length: int, ids: Sequence[int]) -> None:
        """Tokens from `length` on, of the turn under way, give way to others; what the cache holds of them is void."""
        self.token_ids[length:] = ids
        self.cached = min(self.cached, length)

    def record(self, begin: int, experts: Int[np.ndarray, "tokens layers chosen"]) -> None:
        """Keeps the experts of tokens from `begin` on; of those that are computed anew, what was there stays."""
        known = self.prompt + sum(map(len, self.recorded))
        assert begin <= known, "tokens are recorded in their order"
        if begin + len(experts) > known:
            self.recorded.append(experts[known - begin :].copy())

    @property
    def experts(self) -> Int[np.ndarray, "tokens layers chosen"] | None:
        """What is recorded, as one array; None where nothing is."""
        if len(self.recorded) > 1:
            self.recorded = [np.concatenate(self.recorded)]
        return self.recorded[0] if self.recorded else None

    def forget(self) -> None:
        """Nothing of it is in the cache any more."""
        self.pages, self.cached = [], 0

    def next_piece(self, shapes: Sequence[Shape], config: PolicyConfig) -> Piece:
        """As much of what is missing as a static shape holds, in the first that holds it all, or else the most of it.

        A piece brings every image of which it holds a token, so one that falls between two pieces is seen by both.
        """
        begin, end = self.cached, self.length - 1
        spans = self._image_spans(config)
        best = Piece(0, begin, begin)
        for number, (_, tokens, patches) in enumerate(shapes):
            reach = _reach(begin, min(end, begin + tokens), spans, patches)
            if reach > best.end:
                best = Piece(number, begin, reach)
        assert best.end > begin, "an image has more patches than any static shape"  # refused when it was encoded
        return best

    def inputs(self, piece: Piece, config: PolicyConfig) -> "PieceInputs":
        """What the model gets of a piece; features are numbered through the images that come with it."""
        at = slice(piece.begin, piece.end)
        spans = self._image_spans(config)
        shown = [number for number, (first, last, _) in enumerate(spans) if first < piece.end and last > piece.begin]
        features = feature_indices(np.asarray(self.token_ids), *placeholder_ids(config))[at]
        earlier = sum(image.tokens(config) for image in self.images[: shown[0]]) if shown else 0
        return PieceInputs(
            token_ids=np.asarray(self.token_ids[at], np.int32),
            positions=self._all_positions()[at],
            images=[self.images[number] for number in shown],
            feature_index=np.where(features >= 0, features - earlier, -1),
        )

    def _all_positions(self) -> Int[np.ndarray, "tokens 3"]:
        """Those of sampled tokens included: all three count on from the last one known."""
        missing = np.arange(len(self.positions), self.length, dtype=np.int32)[:, None] + self.offset
        return np.concatenate([self.positions, np.repeat(missing, 3, axis=1)])

    def _image_spans(self, config: PolicyConfig) -> list[tuple[int, int, int]]:
        """First and last placeholder (exclusive) of each image, and its patches."""
        if self._spans is None:
            places = np.flatnonzero(np.isin(self.token_ids, placeholder_ids(config))) if self.images else []
            ends = np.cumsum([image.tokens(config) for image in self.images], dtype=int)
            begins = ends - [image.tokens(config) for image in self.images]
            self._spans = [
                (int(places[first]), int(places[last - 1]) + 1, len(image.patches))
                for first, last, image in zip(begins, ends, self.images, strict=True)
            ]
        return self._spans


def _reach(begin: int, end: int, spans: list[tuple[int, int, int]], patches: int) -> int:
    """The largest end up to `end` such that the images in between, even in part, have at most so many patches."""
    room = patches
    for first, last, count in spans:
        if last <= begin or first >= end:
            continue
        if count > room:
            return max(first, begin)
        room -= count
    return end
