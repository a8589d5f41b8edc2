"""Rollout programs: pure functions over one `RolloutState`, jitted and donated.

    prefill   prompts (ids, images) -> their keys and values
    fork      a computed prompt -> any number of slots
    decode    up to N tokens in every live slot; leaves early when enough slots need the host
    append    an observation (ids, images) -> a live slot; the turns before it stay cached
    release   all slots free again, whatever they held

A slot holds `length` tokens. All but the last are in the cache; the last is *pending*: the next decode step
feeds it, so prefill, fork and append hand over in the same way. Feeding a pending token twice writes the same
keys and values to the same place, so slots that wait for a tool ride along in decode unharmed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hdpo_jax.config import RolloutConfig
from hdpo_jax.rollout import cache as kv
from hdpo_jax.rollout.sampling import sample
from models.qwen3_vl import KVCache, PackedImages, Qwen3VLConfig
from sharding.rules import constrain


class RolloutState(NamedTuple):
    """Everything a decode step needs of every slot."""

    cache: KVCache
    pending: Int[Array, " slots"]
    length: Int[Array, " slots"]
    """Tokens in the slot, the pending one included."""
    limit: Int[Array, " slots"]
    """Length at which the trajectory's token budget is spent."""
    offset: Int[Array, " slots"]
    """M-RoPE position minus cache index: images take fewer positions than tokens."""
    keys: Int[Array, "slots 2"]
    """The trajectory's RNG key data."""
    active: Bool[Array, " slots"]
    """Decoding; False while free or waiting for the host."""


class Admission(NamedTuple):
    """Which prompt each slot takes; arrays over slots, static in shape."""

    source: Int[Array, " slots"]
    """Row of the prefilled prompts; -1 leaves the slot as it is."""
    pending: Int[Array, " slots"]
    length: Int[Array, " slots"]
    limit: Int[Array, " slots"]
    offset: Int[Array, " slots"]
    identity: Int[Array, "slots 3"]
    """Step, prompt and sample number: all that the trajectory's randomness depends on beside the seed."""


class Extension(NamedTuple):
    """Observations for some slots; rows that are padding name a slot past the last."""

    slots: Int[Array, " rows"]
    token_ids: Int[Array, "rows tokens"]
    """The slot's pending token, then the observation without its last token, padded on the right."""
    positions: Int[Array, "rows tokens 3"]
    pending: Int[Array, " rows"]
    """The observation's last token."""
    added: Int[Array, " rows"]
    """Tokens that the observation adds to the slot's length."""
    offset: Int[Array, " rows"]


class Chunk(NamedTuple):
    """What a decode call did, in one small transfer."""

    tokens: Int[Array, "slots chunk"]
    """-1 where nothing was sampled; a slot's tokens stand at the front."""
    logprobs: Float[Array, "slots chunk"]
    active: Bool[Array, " slots"]


@dataclass(frozen=True)
class Programs:
    """The jitted programs, bound to one model structure and one set of sampling settings."""

    empty_state: Callable[[], RolloutState]
    prefill: Callable[..., KVCache]
    fork: Callable[[RolloutState, KVCache, Admission], RolloutState]
    decode: Callable[[Any, RolloutState], tuple[RolloutState, Chunk]]
    append: Callable[..., RolloutState]
    release: Callable[[RolloutState], RolloutState]


def trajectory_key(seed: int, identity: Int[Array, " 3"]) -> Int[Array, " 2"]:
    """Key data of a trajectory: the seed folded with step, prompt and sample."""
    key = jax.random.key(seed)
    for number in (identity[0], identity[1], identity[2]):
        key = jax.random.fold_in(key, number)
    return jax.random.key_data(key)


def make_programs(
    graphdef: nnx.GraphDef,
    model_config: Qwen3VLConfig,
    config: RolloutConfig,
    *,
    seed: int,
    stop_ids: Sequence[int],
    forbidden: Bool[np.ndarray, " vocab"],
    dtype: jax.typing.DTypeLike,
) -> Programs:
    """Programs for a model given as NNX graph definition; each takes its parameters as a plain pytree.

    `stop_ids` end a generation turn; `forbidden` tokens are never sampled; `dtype` is the cache's.
    """

    def empty_state() -> RolloutState:
        slots = config.slots
        return _sharded(
            RolloutState(
                cache=KVCache.zeros(model_config, slots, config.capacity, dtype),
                pending=jnp.zeros(slots, jnp.int32),
                length=jnp.ones(slots, jnp.int32),
                limit=jnp.zeros(slots, jnp.int32),
                offset=jnp.zeros(slots, jnp.int32),
                keys=jnp.zeros((slots, 2), jnp.uint32),
                active=jnp.zeros(slots, bool),
            )
        )

    def prefill(
        params: nnx.State,
        token_ids: Int[Array, "rows tokens"],
        positions: Int[Array, "rows tokens 3"],
        images: PackedImages | None,
    ) -> KVCache:
        rows, tokens = token_ids.shape
        empty = KVCache.zeros(model_config, rows, tokens, dtype)
        start = jnp.zeros(rows, jnp.int32)
        _, prompts = nnx.merge(graphdef, params).extend(
            token_ids, positions=positions, cache=empty, start=start, images=images
        )
        return prompts

    def fork(state: RolloutState, prompts: KVCache, admission: Admission) -> RolloutState:
        taken = admission.source >= 0

        def replace(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(taken, range(1, old.ndim)), new, old)

        keys = jax.vmap(lambda identity: trajectory_key(seed, identity))(admission.identity)
        return _sharded(
            RolloutState(
                cache=kv.copy_prompts(state.cache, prompts, admission.source),
                pending=replace(admission.pending, state.pending),
                length=replace(admission.length, state.length),
                limit=replace(admission.limit, state.limit),
                offset=replace(admission.offset, state.offset),
                keys=replace(keys, state.keys),
                active=taken | state.active,
            )
        )

    def decode(params: nnx.State, state: RolloutState) -> tuple[RolloutState, Chunk]:
        model = nnx.merge(graphdef, params)
        slots = state.pending.shape[0]
        at_start = state.active
        enough = jnp.ceil(config.return_early * at_start.sum())
        stops = jnp.asarray(stop_ids, jnp.int32)

        def goes_on(carry: tuple[Int[Array, ""], RolloutState, Chunk]) -> Bool[Array, ""]:
            step, now, _ = carry
            waiting = (at_start & ~now.active).sum()
            return (step < config.chunk) & now.active.any() & ((waiting < enough) | (step == 0))

        def one_token(
            carry: tuple[Int[Array, ""], RolloutState, Chunk],
        ) -> tuple[Int[Array, ""], RolloutState, Chunk]:
            step, now, chunk = carry
            index = now.length - 1
            positions = jnp.broadcast_to((index + now.offset)[:, None, None], (slots, 1, 3))
            hidden, cache = model.extend(now.pending[:, None], positions=positions, cache=now.cache, start=index)
            keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(now.keys), now.length)
            token, logprob = sample(
                model.logits(hidden[:, 0]),
                keys,
                jnp.asarray(forbidden),
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            )
            length = now.length + now.active
            stopped = (token[:, None] == stops).any(axis=1) | (length >= now.limit)
            chunk = chunk._replace(
                tokens=chunk.tokens.at[:, step].set(jnp.where(now.active, token, -1)),
                logprobs=chunk.logprobs.at[:, step].set(jnp.where(now.active, logprob, 0.0)),
            )
            now = now._replace(
                cache=cache,
                pending=jnp.where(now.active, token, now.pending),
                length=length,
                active=now.active & ~stopped,
            )
            return step + 1, _sharded(now), chunk

        nothing = Chunk(
            tokens=jnp.full((slots, config.chunk), -1, jnp.int32),
            logprobs=jnp.zeros((slots, config.chunk), jnp.float32),
            active=state.active,
        )
        _, state, chunk = jax.lax.while_loop(goes_on, one_token, (jnp.int32(0), state, nothing))
        return state, chunk._replace(active=state.active)

    def append(
        params: nnx.State, state: RolloutState, extension: Extension, images: PackedImages | None
    ) -> RolloutState:
        rows = kv.take_rows(state.cache, extension.slots)
        start = state.length.at[extension.slots].get(mode="clip") - 1
        _, extended = nnx.merge(graphdef, params).extend(
            extension.token_ids, positions=extension.positions, cache=rows, start=start, images=images
        )
        at = extension.slots
        return _sharded(
            state._replace(
                cache=kv.put_rows(state.cache, extended, at),
                pending=state.pending.at[at].set(extension.pending, mode="drop"),
                length=state.length.at[at].add(extension.added, mode="drop"),
                offset=state.offset.at[at].set(extension.offset, mode="drop"),
                active=state.active.at[at].set(True, mode="drop"),
            )
        )

    def release(state: RolloutState) -> RolloutState:
        return _sharded(state._replace(active=jnp.zeros_like(state.active)))

    return Programs(
        empty_state=jax.jit(empty_state),
        prefill=jax.jit(prefill),
        fork=jax.jit(fork, donate_argnums=0),
        decode=jax.jit(decode, donate_argnums=1),
        append=jax.jit(append, donate_argnums=1),
        release=jax.jit(release, donate_argnums=0),
    )


def _sharded(state: RolloutState) -> RolloutState:
    """The state with its slots spread over the mesh, so that every program hands it over in the same layout."""
    return RolloutState(
        cache=kv.sharded(state.cache),
        **{name: constrain(value, "slots", *[None] * (value.ndim - 1)) for name, value in _rest(state).items()},
    )


def _rest(state: RolloutState) -> dict[str, jax.Array]:
    return {name: value for name, value in state._asdict().items() if name != "cache"}
