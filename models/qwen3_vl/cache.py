"""The key-value cache: pages of a fixed number of tokens, which rows of tokens own or share. In two layouts.

Pages lie in lanes, one for each part that the mesh splits rows into: a row's pages are all in its own lane, so reading
them crosses no device. Page 0 of a lane belongs to nobody: a table names it where the row has no page, and what is
written there is never seen.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.policy import PolicyConfig
from sharding import constrain, on_each_device


class KVCache(NamedTuple):
    """Keys and values of all layers. A row of tokens names its pages, in order, in a table; rows may share pages.

    A page's keys stand feature by feature. The scores of a decode step are then sums over whole runs of tokens, which
    takes 0.6 of the time on a CPU that [page, size] does.
    """

    AXES = ("slots", "layers", None, "kv_heads", None, None)
    """Logical axes of each array."""

    keys: Float[Array, "lanes layers pages kv_heads size page"]
    values: Float[Array, "lanes layers pages kv_heads page size"]

    @classmethod
    def zeros(
        cls, config: PolicyConfig, *, pages: int, page: int, lanes: int = 1, dtype: DTypeLike = jnp.bfloat16
    ) -> "KVCache":
        """An empty cache of `pages` pages a lane, page 0 included, for `page` tokens each."""
        text = config.text
        lead = (lanes, text.num_hidden_layers, pages, text.num_key_value_heads)
        keys, values = (*lead, text.head_dim, page), (*lead, page, text.head_dim)
        return cls(keys=jnp.zeros(keys, dtype), values=jnp.zeros(values, dtype)).sharded()

    @property
    def lanes(self) -> int:
        return self.keys.shape[0]

    @property
    def page(self) -> int:
        """Tokens a page holds."""
        return self.keys.shape[-1]

    def write(
        self,
        layer: Int[Array, ""],
        table: Int[Array, "batch width"],
        index: Int[Array, "batch tokens"],
        keys: Float[Array, "batch tokens kv_heads size"],
        values: Float[Array, "batch tokens kv_heads size"],
    ) -> "KVCache":
        """With the keys and values of some tokens at these places of their rows; past a row's table they are dropped.

        Rows stand in the order of lanes, equally many in each.
        """

        def put(lane: KVCache, table: Array, index: Array, keys: Array, values: Array) -> KVCache:
            at = _pages_at(table, index // self.page, lane.keys.shape[1])
            place = index % self.page
            return KVCache(
                keys=lane.keys.at[layer, at, :, :, place].set(keys.astype(lane.keys.dtype), mode="drop"),
                values=lane.values.at[layer, at, :, place].set(values.astype(lane.values.dtype), mode="drop"),
            )

        parts = (by_lane(part, self.lanes) for part in (table, index, keys, values))
        return jax.vmap(put)(self, *parts)

    def copy_pages(self, source: Int[Array, "lanes copies"], target: Int[Array, "lanes copies"]) -> "KVCache":
        """With each `source` page copied over its `target`, in every layer; 0 to 0 copies nothing that is seen."""
        return jax.tree.map(lambda pages: jax.vmap(_copy)(pages, source, target), self).sharded()

    def sharded(self) -> "KVCache":
        """The cache spread over the mesh by lanes and heads."""
        return KVCache(*(constrain(array, *self.AXES) for array in self))


class RaggedCache(NamedTuple):
    """The same, as the kernel for a TPU reads it (see `ragged`): token by token, a head's values behind its keys.

    What is written lies in the layout that is read. In `KVCache` the two differ on a TPU, and the compiler copies the
    whole cache between them, in every layer of every step.
    """

    AXES = ("slots", "layers", None, None, "kv_heads", None)

    pages: Float[Array, "lanes layers pages page keys_and_values size"]

    @classmethod
    def zeros(
        cls, config: PolicyConfig, *, pages: int, page: int, lanes: int = 1, dtype: DTypeLike = jnp.bfloat16
    ) -> "RaggedCache":
        """As `KVCache.zeros`."""
        text = config.text
        shape = (lanes, text.num_hidden_layers, pages, page, 2 * text.num_key_value_heads, text.head_dim)
        return cls(jnp.zeros(shape, dtype)).sharded()

    @property
    def lanes(self) -> int:
        return self.pages.shape[0]

    @property
    def page(self) -> int:
        """Tokens a page holds."""
        return self.pages.shape[3]

    def write(
        self,
        layer: Int[Array, ""],
        table: Int[Array, "batch width"],
        index: Int[Array, "batch tokens"],
        keys: Float[Array, "batch tokens kv_heads size"],
        values: Float[Array, "batch tokens kv_heads size"],
    ) -> "RaggedCache":
        """As `KVCache.write`, of tokens that follow each other."""
        both = jnp.stack([keys, values], axis=3).astype(self.pages.dtype)
        both = both.reshape(*both.shape[:2], -1, both.shape[-1])
        parts = (by_lane(part, self.lanes) for part in (table, index[:, 0], both))
        return RaggedCache(jax.vmap(partial(self._put, layer))(self.pages, *parts))

    def _put(self, layer: Array, lane: Array, table: Array, start: Array, both: Array) -> Array:
        """Page by page: a TPU writes one place after another, and a prompt's tokens are many."""
        touched = -(-(both.shape[1] - 1) // self.page) + 1
        at = _pages_at(table, start[:, None] // self.page + jnp.arange(touched), lane.shape[1])
        held = lane.at[layer, at].get(mode="clip")
        joined = held.reshape(len(at), -1, *held.shape[3:])
        update = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
        joined = update(joined, both, start % self.page)
        return lane.at[layer, at].set(joined.reshape(held.shape), mode="drop")

    def copy_pages(self, source: Int[Array, "lanes copies"], target: Int[Array, "lanes copies"]) -> "RaggedCache":
        """As `KVCache.copy_pages`."""
        return RaggedCache(jax.vmap(_copy)(self.pages, source, target)).sharded()

    def sharded(self) -> "RaggedCache":
        """The cache spread over the mesh by lanes and heads."""
        return RaggedCache(constrain(self.pages, *self.AXES))


Cache = KVCache | RaggedCache


class SharedPages(NamedTuple):
    """Rows of a lane that begin with the same pages, in groups. Every row is in a group, if only in one of its own.

    There may be as many groups as rows; those in use come first.
    """

    members: Int[Array, "rows most"]
    """The rows of each group, numbered within the lane; where it has fewer, any."""
    place: Int[Array, " rows"]
    """Where each row stands among the members of all groups: its group times `most`, plus its place there."""
    pages: Int[Array, " rows"]
    """How many pages the rows of a group begin with alike; full ones, before the token that looks at them."""


def on_each_lane(
    function: Callable[..., Array],
    queries: Float[Array, "batch queries heads size"],
    cache: Cache,
    layer: Int[Array, ""],
    table: Int[Array, "batch width"],
    index: Int[Array, "batch queries"],
) -> Float[Array, "batch queries heads size"]:
    """`function` of the queries, the cache's arrays, `layer`, `table` and each row's first index, as each device has
    them: for its own lanes and heads."""
    arrays = (queries, *cache, layer, table, index[:, 0])
    of_cache = [cache.AXES for _ in cache]
    return on_each_device(
        function, arrays, [("slots", None, "heads", None), *of_cache, (), ("slots", None), ("slots",)]
    )


def flat_pages(pages: Float[Array, "lanes layers pages ..."]) -> Float[Array, "all ..."]:
    """All pages of all lanes and layers, in one row: nothing is sliced, so nothing is copied."""
    return pages.reshape(-1, *pages.shape[3:])


def flat_table(
    table: Int[Array, "batch width"], pages: Float[Array, "lanes layers pages ..."], layer: Int[Array, ""]
) -> Int[Array, "batch width"]:
    """The numbers that the pages of `layer` have among `flat_pages`."""
    lanes, layers, count = pages.shape[:3]
    lane = jnp.arange(len(table)) // (len(table) // lanes)
    return table + count * (layer + layers * lane[:, None])


def _pages_at(
    table: Int[Array, "rows width"], number: Int[Array, "rows some"], nowhere: int
) -> Int[Array, "rows some"]:
    """The pages of these numbers in each row; past the row's table, `nowhere`."""
    return jnp.take_along_axis(table, number, axis=1, mode="fill", fill_value=nowhere)


def _copy(
    pages: Float[Array, "layers pages ..."], source: Int[Array, " copies"], target: Int[Array, " copies"]
) -> Float[Array, "layers pages ..."]:
    return pages.at[:, target].set(pages[:, source])


def by_lane(array: Array, lanes: int) -> Array:
    """Rows in the order of lanes -> lanes of rows."""
    return array.reshape(lanes, -1, *array.shape[1:])


def unshared_table(rows: int, width: int, lanes: int = 1) -> Int[np.ndarray, "rows width"]:
    """A table in which every row has `width` pages of its own, of `1 + rows * width / lanes` pages a lane."""
    return np.tile(1 + np.arange(rows // lanes * width, dtype=np.int32), lanes).reshape(rows, width)
