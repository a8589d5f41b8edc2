"""Packed rows through the model: what the policy's and the supervised loss both start from."""

from flax import nnx
from jaxtyping import Array, Float, PyTree

from hdpo_jax.types import PackedRows


def row_states(
    graphdef: nnx.GraphDef, params: PyTree, rows: PackedRows
) -> tuple[Float[Array, "rows tokens embed"], Float[Array, "embed vocab"]]:
    """Hidden states after the final norm, and the output matrix that turns them into logits."""
    model = nnx.merge(graphdef, params)
    hidden = model.hidden_states(
        rows.token_ids,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        prefix_ids=rows.prefix_ids,
        images=rows.images,
        experts=rows.experts,
    )
    return hidden, model.head
