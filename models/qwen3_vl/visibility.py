"""Who sees whom in attention, told by ids and indices; a mask in memory only where a kernel can not do without."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

UNSEEN = -1e30
"""The score of a key that is not seen. Finite, so that a query that sees nothing (padding) gives an average and not
NaN, forward and backward."""


class Visibility(NamedTuple):
    """Which keys a query sees; each rule that is given narrows it.

    Where rows are causal, the tokens of a segment stand together, and the segments that share a prefix behind it.
    """

    query_ids: Int[Array, "batch queries"] | None = None
    """A query sees keys of its own segment, and of the segment named in `prefix_ids`. Keys of segment 0: never."""
    prefix_ids: Int[Array, "batch queries"] | None = None
    key_ids: Int[Array, "batch keys"] | None = None
    query_index: Int[Array, "batch queries"] | None = None
    """Causal: a query sees keys up to and with this index."""

    def mask(self, keys: int) -> Bool[Array, "batch queries keys"]:
        rules = []
        if self.query_index is not None:
            rules.append(jnp.arange(keys) <= self.query_index[:, :, None])
        if self.query_ids is not None and self.key_ids is not None:
            key_ids = self.key_ids[:, None, :]
            same = key_ids == self.query_ids[:, :, None]
            if self.prefix_ids is not None:
                same |= key_ids == self.prefix_ids[:, :, None]
            rules.append(same & (key_ids > 0))
        if not rules:
            raise ValueError("Visibility needs query and key ids, or query_index, or both")
        return rules[0] if len(rules) == 1 else rules[0] & rules[1]
