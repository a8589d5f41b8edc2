"""The key-value cache: pages of a fixed number of tokens, which rows of tokens own or share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.policy import PolicyConfig
from sharding import constrain


class KVCache(NamedTuple):
    """Keys and values of all layers. A row of tokens names its pages, in order, in a table; rows may share pages.

    Pages lie in lanes, one for each part that the mesh splits rows into: a row's pages are all in its own lane, so
    reading them crosses no device. Page 0 of a lane belongs to nobody: a table names it where the row has no page,
    and what is written there is never seen.

    A page's keys stand feature by feature. The scores of a decode step are then sums over whole runs of tokens, which
    takes 0.6 of the time on a CPU that [page, size] does.
    """

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
            nowhere = lane.keys.shape[1]
            at = jnp.take_along_axis(table, index // self.page, axis=1, mode="fill", fill_value=nowhere)
            place = index % self.page
            return KVCache(
                keys=lane.keys.at[layer, at, :, :, place].set(keys.astype(lane.keys.dtype), mode="drop"),
                values=lane.values.at[layer, at, :, place].set(values.astype(lane.values.dtype), mode="drop"),
            )

        parts = (by_lane(part, self.lanes) for part in (table, index, keys, values))
        return jax.vmap(put)(self, *parts)

    def copy_pages(self, source: Int[Array, "lanes copies"], target: Int[Array, "lanes copies"]) -> "KVCache":
        """With each `source` page copied over its `target`, in every layer; 0 to 0 copies nothing that is seen."""

        def copy(pages: Array, source: Array, target: Array) -> Array:
            return pages.at[:, target].set(pages[:, source])

        return jax.tree.map(lambda pages: jax.vmap(copy)(pages, source, target), self).sharded()

    def sharded(self) -> "KVCache":
        """The cache spread over the mesh by lanes and heads."""
        return KVCache(*(constrain(array, "slots", "layers", None, "kv_heads", None, None) for array in self))


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


def by_lane(array: Array, lanes: int) -> Array:
    """Rows in the order of lanes -> lanes of rows."""
    return array.reshape(lanes, -1, *array.shape[1:])


def unshared_table(rows: int, width: int, lanes: int = 1) -> Int[np.ndarray, "rows width"]:
    """A table in which every row has `width` pages of its own, of `1 + rows * width / lanes` pages a lane."""
    return np.tile(1 + np.arange(rows // lanes * width, dtype=np.int32), lanes).reshape(rows, width)
