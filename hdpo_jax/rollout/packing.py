"""Trajectories -> packed rows of fixed size, each prompt once a row however many of its rollouts stand there.

A row is laid out as  [prompt without its last token][response 1][response 2]…[next prompt]…  where a response
segment begins with the prompt's last token: that token predicts the response's first one. Responses see their
prompt and themselves (`PackedRows.prefix_ids`), so packed and unpacked rows give the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from hdpo_jax.config import ConfigError
from hdpo_jax.types import PackedRows, Trajectory
from models.policy import PolicyConfig
from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import merge_side, mrope_positions, pack_images, placeholder_ids


class PackingError(ValueError):
    """A segment does not fit an empty row."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of tokens that sees itself and its family's prefix; arrays over its input positions."""

    token_ids: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, "tokens 3"]
    targets: Int[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    logprobs: Float[np.ndarray, " tokens"]
    sampled_logprobs: Float[np.ndarray, " tokens"]
    rollout: int
    images: Sequence[EncodedImage]
    experts: Int[np.ndarray, "tokens layers chosen"] | None = None
    """Those that the tokens are to go through; None: the router chooses."""

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def patches(self) -> int:
        return sum(len(image.patches) for image in self.images)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Segments that share a prefix: a prompt and its rollouts, or one conversation alone."""

    prefix: Segment | None
    segments: Sequence[Segment]


@dataclass
class _Row:
    tokens: int = 0
    patches: int = 0
    members: dict[int, list[Segment]] = field(default_factory=dict)
    """Family index -> its segments in this row; the family's prefix comes first."""


class RowShape(NamedTuple):
    """Static sizes of a row."""

    tokens: int
    patches: int


def group_family(group: Sequence[Trajectory], first_rollout: int, config: PolicyConfig) -> Family:
    """A group's rollouts as segments behind their prompt. `first_rollout` is the flat index of sample 0.

    The prompt's experts are those of sample 0: another lane may have computed it for others.
    """
    lead = group[0]
    last = lead.prompt_length - 1
    segments = []
    for trajectory in group:
        ids = trajectory.token_ids
        positions, _ = mrope_positions(ids, [image.grid for image in trajectory.images], config)
        segments.append(
            Segment(
                token_ids=ids[last:-1],
                positions=positions[last:-1],
                targets=ids[last + 1 :],
                loss_mask=trajectory.sampled[last + 1 :],
                logprobs=trajectory.logprobs[last + 1 :],
                sampled_logprobs=trajectory.sampled_logprobs[last + 1 :],
                rollout=first_rollout + trajectory.sample,
                images=trajectory.images[trajectory.prompt_images :],
                experts=trajectory.experts,
            )
        )
    images = lead.images[: lead.prompt_images]
    positions, _ = mrope_positions(lead.token_ids[:last], [image.grid for image in images], config)
    prefix = Segment(
        token_ids=lead.token_ids[:last],
        positions=positions,
        targets=lead.token_ids[1 : last + 1],
        loss_mask=np.zeros(last, bool),
        logprobs=np.zeros(last, np.float32),
        sampled_logprobs=np.zeros(last, np.float32),
        rollout=0,
        images=images,
        experts=lead.prompt_experts,
    )
    return Family(prefix=prefix, segments=segments)


def conversation_family(
    token_ids: Int[np.ndarray, " tokens"],
    learned: Bool[np.ndarray, " tokens"],
    images: Sequence[EncodedImage],
    config: PolicyConfig,
) -> Family:
    """One conversation as a segment of its own; `learned` marks the tokens whose prediction counts."""
    positions, _ = mrope_positions(token_ids, [image.grid for image in images], config)
    segment = Segment(
        token_ids=token_ids[:-1],
        positions=positions[:-1],
        targets=token_ids[1:],
        loss_mask=learned[1:],
        logprobs=np.zeros(len(token_ids) - 1, np.float32),
        sampled_logprobs=np.zeros(len(token_ids) - 1, np.float32),
        rollout=0,
        images=images,
    )
    return Family(prefix=None, segments=[segment])


def require_experts(config: PolicyConfig) -> tuple[int, int]:
    """Layers, and experts of a token in each; ConfigError for a model that has none to replay."""
    found = config.text.experts_a_token
    if found is None:
        raise ConfigError("rollout.replay_experts is on, and the model has no experts: expected False")
    return found


def assign_rows(families: Sequence[Family], shape: RowShape) -> list[list[tuple[Segment | None, list[Segment]]]]:
    """First-fit-decreasing: families by size, each segment into the first row that holds it and its prefix."""

    def size(family: Family) -> int:
        return sum(segment.tokens for segment in family.segments)

    rows: list[_Row] = []
    for index in sorted(range(len(families)), key=lambda i: -size(families[i])):
        family = families[index]
        for segment in sorted(family.segments, key=lambda segment: -segment.tokens):
            _place(rows, index, family.prefix, segment, shape)
    return [[(families[index].prefix, segments) for index, segments in row.members.items()] for row in rows]


def _place(rows: list[_Row], index: int, prefix: Segment | None, segment: Segment, shape: RowShape) -> None:
    prefix_tokens, prefix_patches = (prefix.tokens, prefix.patches) if prefix else (0, 0)

    def cost(row: _Row) -> tuple[int, int]:
        new = index not in row.members
        return segment.tokens + new * prefix_tokens, segment.patches + new * prefix_patches

    def fits(row: _Row) -> bool:
        tokens, patches = cost(row)
        return row.tokens + tokens <= shape.tokens and row.patches + patches <= shape.patches

    def beside_its_family(row: _Row) -> bool:
        return index not in row.members

    row = next((row for row in sorted(rows, key=beside_its_family) if fits(row)), None)
    if row is None:
        row = _Row()
        if not fits(row):
            tokens, patches = cost(row)
            raise PackingError(
                f"a segment of {tokens} tokens and {patches} image patches does not fit a row of {shape.tokens} "
                f"and {shape.patches}; raise train.row_tokens or train.row_patches"
            )
        rows.append(row)
    tokens, patches = cost(row)
    row.tokens += tokens
    row.patches += patches
    row.members.setdefault(index, []).append(segment)


def fill_rows(
    rows: Sequence[Sequence[tuple[Segment | None, list[Segment]]]],
    count: int,
    shape: RowShape,
    config: PolicyConfig,
    *,
    patch_dtype: DTypeLike = np.float32,
    experts: bool = False,
) -> PackedRows:
    """The assigned rows as arrays of `count` rows; rows past the assigned ones are padding.

    `experts`: with those of every segment, which all have them then.
    """
    size = (count, shape.tokens)
    token_ids, targets, segment_ids, prefix_ids, rollout = (np.zeros(size, np.int32) for _ in range(5))
    positions = np.zeros((*size, 3), np.int32)
    loss_mask = np.zeros(size, bool)
    logprobs, sampled_logprobs = np.zeros(size, np.float32), np.zeros(size, np.float32)
    feature_index = np.full(size, -1, np.int32)
    images: list[list[EncodedImage]] = [[] for _ in range(count)]
    merge = merge_side(config) ** 2
    replayed = _no_experts(size, config) if experts else None

    for r, families in enumerate(rows):
        cursor, number, features = 0, 0, 0

        for prefix, segments in families:
            prefix_number = number + 1 if prefix else 0
            for segment in [prefix, *segments] if prefix else segments:
                number += 1
                at = slice(cursor, cursor + segment.tokens)
                token_ids[r, at] = segment.token_ids
                positions[r, at] = segment.positions
                targets[r, at] = segment.targets
                loss_mask[r, at] = segment.loss_mask
                logprobs[r, at] = np.where(segment.loss_mask, segment.logprobs, 0.0)
                sampled_logprobs[r, at] = np.where(segment.loss_mask, segment.sampled_logprobs, 0.0)
                rollout[r, at] = np.where(segment.loss_mask, segment.rollout, 0)
                segment_ids[r, at] = number
                prefix_ids[r, at] = prefix_number or number
                if replayed is not None and segment.tokens:
                    replayed[r, at] = segment.experts
                if segment.images:
                    places = np.flatnonzero(np.isin(segment.token_ids, placeholder_ids(config))) + cursor
                    feature_index[r, places] = features + np.arange(len(places))
                    features += segment.patches // merge
                    images[r].extend(segment.images)
                cursor += segment.tokens

    with_images = shape.patches and config.vision
    packed = pack_images(config, images, feature_index, shape.patches, dtype=patch_dtype) if with_images else None
    # Programs take NumPy arrays as they take JAX's, which is what the record declares.
    policy: list[Any] = [targets, loss_mask, rollout, logprobs, sampled_logprobs]
    arrays: list[Any] = [token_ids, positions, segment_ids, prefix_ids, *policy, packed, replayed]
    return PackedRows(*arrays)


def _no_experts(size: tuple[int, int], config: PolicyConfig) -> Int[np.ndarray, "rows tokens layers chosen"]:
    """What padding goes through: as many experts as any token, for none may be named twice."""
    layers, chosen = require_experts(config)
    return np.broadcast_to(np.arange(chosen, dtype=config.text.expert_dtype), (*size, layers, chosen)).copy()


def padding_share(rows: PackedRows, micro_batches: Int[np.ndarray, " mini"]) -> float:
    """Share of padding in the tokens that are computed: all rows of the micro-batches in use, [mini, micro, …]."""
    held = np.asarray(rows.segment_ids) > 0
    computed = np.arange(held.shape[1]) < np.asarray(micro_batches)[:, None]
    return float(1.0 - held[computed].mean()) if computed.any() else 0.0
