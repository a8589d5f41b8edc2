"""Rollout programs: pure functions of a key-value cache, jitted, the cache donated from each to the next.

    extend    parts of prompts and observations (ids, images) -> their keys and values, in the pages of their rows
    copy      pages -> pages: the last, half full page of a prompt, for each rollout that goes on from it
    lay_out   the policy's parameters -> the same as `decode` reads them, once a batch of rollouts
    decode    up to N tokens in every running slot; leaves early when enough slots need the host

Nothing but the cache stays on the device. What a slot is going on with (`Running`) is known to the host, small, and
sent along with every call, so a trajectory may leave its slot while a tool runs and go on in another.

A running slot holds `length` tokens. All but the last are in the cache; the last is *pending*: the next step feeds it.
A slot that has stopped is fed its pending token again and again, which writes the same values to the same place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout.sampling import OwnSampling, sample, sample_own
from models.policy import PolicyModel
from models.qwen3_vl import Cache, PackedImages, SharedPages, cache_for, decoding_layout
from sharding.rules import constrain


class Extension(NamedTuple):
    """Parts of rows to compute; rows in the order of lanes, unused ones with a table of zeros."""

    table: Int[Array, "rows width"]
    token_ids: Int[Array, "rows tokens"]
    """Padded on the right. Padding lands in pages nobody reads, or where the row's next tokens overwrite it."""
    positions: Int[Array, "rows tokens 3"]
    start: Int[Array, " rows"]
    """Index of each row's first token here."""
    images: PackedImages | None


class Copies(NamedTuple):
    """Pages to copy in each lane; 0 to 0 where there are fewer."""

    source: Int[Array, "lanes copies"]
    target: Int[Array, "lanes copies"]


class Running(NamedTuple):
    """What each slot goes on with; slots in the order of lanes."""

    table: Int[Array, "slots width"]
    pending: Int[Array, " slots"]
    length: Int[Array, " slots"]
    """Tokens of the trajectory, the pending one included."""
    limit: Int[Array, " slots"]
    """Length at which its token budget is spent."""
    offset: Int[Array, " slots"]
    """M-RoPE position minus index: images take fewer positions than tokens."""
    identity: Int[Array, "slots 3"]
    """Step, prompt and sample number: all that its randomness depends on beside the seed."""
    recent: Int[Array, "slots recent"]
    """The turn's last tokens, -1 before its first: as many as the longest stop sequence has, less one."""
    active: Bool[Array, " slots"]
    """False: nothing in the slot."""
    shared: SharedPages | None
    """The pages of prompts that several slots go on from; None: none is read together."""
    own: OwnSampling | None = None
    """How each slot is sampled; None: all as the configuration says."""


class Chunk(NamedTuple):
    """What a decode call sampled, on the host; a slot's tokens stand at the front."""

    counts: Int[np.ndarray, " slots"]
    tokens: Int[np.ndarray, "slots chunk"]
    logprobs: Float[np.ndarray, "slots chunk"]
    """Under the policy: temperature applied, nothing truncated. What the trainer recomputes."""
    sampled_logprobs: Float[np.ndarray, "slots chunk"]
    """Under the distribution that the token was drawn from, truncated by top-k, top-p and min-p."""
    ended: Bool[np.ndarray, " slots"]
    """The slot stopped: at a stop sequence, or at its limit."""
    forced: Bool[np.ndarray, " slots"]
    """Its last token was not sampled: it was written, for the budget is spent."""
    steps: int
    """Decode steps that were done: as many as the slot that went on for longest has tokens, here or elsewhere."""
    experts: Int[np.ndarray, "slots chunk layers chosen"] | None
    """Where they are recorded: those of the tokens that were fed, which is each sampled one's predecessor."""


Carry = tuple[Array, Cache, Running, Array, Array, Array | None]
"""Of the decode loop: steps done, cache, slots, which of them were forced to end, what was sampled, and the experts."""
Experts = Int[Array, "rows tokens layers chosen"]
"""Which experts each token went through; the layers that have none stand there too."""


class Report(NamedTuple):
    """A `Chunk` as few arrays, for few transfers."""

    words: Int[Array, "slots fields"]
    """Of 32 bits: count, ended (2: forced to), steps, then three times `chunk`."""
    experts: Experts | None


@dataclass(frozen=True)
class Programs:
    """The programs, bound to one model structure and one set of sampling settings."""

    lay_out: Callable[[nnx.State], nnx.State]
    empty_cache: Callable[[], Cache]
    extend: Callable[[nnx.State, Cache, Extension], tuple[Cache, Experts | None]]
    """Experts, here and in a report, only where `config.replay_experts` asks for them."""
    copy: Callable[[Cache, Copies], Cache]
    decode: Callable[[nnx.State, Cache, Running], tuple[Cache, Report]]
    """Its parameters are those that `lay_out` returns."""


def trajectory_key(seed: int, identity: Int[Array, " 3"]) -> Array:
    """RNG key of a trajectory: the seed folded with step, prompt and sample."""
    key = jax.random.key(seed)
    for number in (identity[0], identity[1], identity[2]):
        key = jax.random.fold_in(key, number)
    return key


def make_programs(
    model: PolicyModel,
    config: RolloutConfig,
    *,
    platform: str,
    lanes: int,
    seed: int,
    stops: Sequence[Sequence[int]],
    end_id: int,
    forbidden: Bool[np.ndarray, " vocab"],
) -> Programs:
    """Programs for a model's structure; each takes the parameters as a plain pytree. `platform` is the devices'.

    `stops` are the token sequences that end a turn; `end_id` is written, not sampled, where a budget ends and
    `config.force_end` is set; `forbidden` tokens are never sampled.
    """
    graphdef, _ = nnx.split(model)
    alike = partial(sample, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
    model_config, dtype = model.config, model.dtype
    decoder, lay_out = decoding_layout(
        model, platform=platform, rows=-(-config.slots // lanes), gathered=config.parameters == "gathered"
    )

    def empty_cache() -> Cache:
        return cache_for(platform, model_config).zeros(
            model_config, pages=config.pages_per_lane(lanes), page=config.page, lanes=lanes, dtype=dtype
        )

    def extend(params: nnx.State, cache: Cache, extension: Extension) -> tuple[Cache, Experts | None]:
        _, cache, experts = nnx.merge(graphdef, params).extend(
            extension.token_ids,
            positions=extension.positions,
            cache=cache,
            table=extension.table,
            start=extension.start,
            images=extension.images,
        )
        return cache.sharded(), asked_for(experts)

    def asked_for(experts: Experts | None) -> Experts | None:
        return constrain(experts, "slots", None, None, None) if config.replay_experts and experts is not None else None

    def copy(cache: Cache, copies: Copies) -> Cache:
        return cache.copy_pages(copies.source, copies.target)

    def decode(params: nnx.State, cache: Cache, running: Running) -> tuple[Cache, Report]:
        model = nnx.merge(decoder, params)
        running = jax.tree.map(lambda field: constrain(field, "slots", *[None] * (field.ndim - 1)), running)
        slots = running.pending.shape[0]
        keys = jax.vmap(lambda identity: trajectory_key(seed, identity))(running.identity)
        draw = partial(sample_own, own=running.own) if running.own else alike
        enough = jnp.ceil(config.return_early * running.active.sum())

        def goes_on(carry: Carry) -> Bool[Array, ""]:
            step, _, now, *_ = carry
            stopped = (running.active & ~now.active).sum()
            return (step < config.chunk) & now.active.any() & ((stopped < enough) | (step == 0))

        def one_token(carry: Carry) -> Carry:
            step, cache, now, forced, sampled, record = carry
            index = now.length - 1
            hidden, cache, experts = model.extend(
                now.pending[:, None],
                positions=jnp.broadcast_to((index + now.offset)[:, None, None], (slots, 1, 3)),
                cache=cache,
                table=now.table,
                start=index,
                shared=now.shared,
            )
            token, logprob, sampled_logprob = draw(
                model.logits(hidden[:, 0]),
                jax.vmap(jax.random.fold_in)(keys, now.length),
                jnp.asarray(forbidden),
            )
            length = now.length + now.active
            spent = length >= now.limit
            recent = jnp.concatenate([now.recent, token[:, None]], axis=1)
            stopped = _stopped(recent, stops)
            if config.force_end:
                unended = now.active & spent & ~stopped
                forced |= unended
                token = jnp.where(unended, end_id, token)
                logprob, sampled_logprob = (jnp.where(unended, 0, each) for each in (logprob, sampled_logprob))
            words = jnp.stack([token, _as_words(logprob), _as_words(sampled_logprob)])
            return (
                step + 1,
                cache.sharded(),
                now._replace(
                    pending=jnp.where(now.active, token, now.pending),
                    length=length,
                    recent=jnp.where(now.active[:, None], recent[:, 1:], now.recent),
                    active=now.active & ~(spent | stopped),
                ),
                forced,
                sampled.at[:, :, step].set(words),
                None if record is None or experts is None else record.at[:, step].set(experts[:, 0]),
            )

        nothing = jnp.zeros((3, slots, config.chunk), jnp.int32)
        first = (jnp.int32(0), cache, running, jnp.zeros(slots, bool), nothing, no_experts(slots))
        with jax.named_scope("steps"):
            steps, cache, then, forced, sampled, record = jax.lax.while_loop(goes_on, one_token, first)
        ended = (running.active & ~then.active).astype(jnp.int32) + forced
        flags = jnp.stack([then.length - running.length, ended, jnp.full(slots, steps)], axis=1)
        return cache, Report(constrain(jnp.concatenate([flags, *sampled], axis=1), "slots", None), asked_for(record))

    def no_experts(slots: int) -> Experts | None:
        sizes = model_config.text.experts_a_token
        if not config.replay_experts or sizes is None:
            return None
        return jnp.zeros((slots, config.chunk, *sizes), model_config.text.expert_dtype)

    return Programs(
        lay_out=lay_out,
        empty_cache=jax.jit(empty_cache),
        extend=jax.jit(extend, donate_argnums=1),
        copy=jax.jit(copy, donate_argnums=0),
        decode=jax.jit(decode, donate_argnums=1),
    )


def read_report(report: Report) -> Chunk:
    """What `decode` reported, on the host, with its words as what they are."""
    flags, words = np.split(np.asarray(report.words), [3], axis=1)
    tokens, logprobs, sampled_logprobs = np.split(np.ascontiguousarray(words), 3, axis=1)
    return Chunk(
        counts=flags[:, 0],
        tokens=tokens,
        logprobs=np.ascontiguousarray(logprobs).view(np.float32),
        sampled_logprobs=np.ascontiguousarray(sampled_logprobs).view(np.float32),
        ended=flags[:, 1] > 0,
        forced=flags[:, 1] > 1,
        steps=int(flags[0, 2]),
        experts=None if report.experts is None else np.asarray(report.experts),
    )


def _as_words(values: Float[Array, " slots"]) -> Int[Array, " slots"]:
    return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)


def _stopped(recent: Int[Array, "slots recent"], stops: Sequence[Sequence[int]]) -> Bool[Array, " slots"]:
    """Whether a slot's tokens end in one of the sequences."""
    found: Any = jnp.zeros(len(recent), bool)
    for stop in stops:
        found |= (recent[:, -len(stop) :] == jnp.asarray(stop, jnp.int32)).all(axis=1)
    return found
