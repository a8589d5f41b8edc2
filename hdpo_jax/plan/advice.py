"""What to change in a run that does not fit its slice."""

from collections.abc import Iterator, Mapping

from hdpo_jax.config import RLConfig
from hdpo_jax.plan.estimate import Estimate


def advice(config: RLConfig, programs: Mapping[str, Estimate], limit: float) -> Iterator[str]:
    """One line a change, the dearest first; nothing where all fits."""
    over = {name: one for name, one in programs.items() if one.hbm_bytes > limit}
    if not over:
        return
    learning = [one for name, one in over.items() if name in ("update", "sft_step")]
    if learning:
        worst = max(learning, key=lambda one: one.hbm_bytes)
        if worst.temporary_bytes >= worst.argument_bytes:
            if config.model.remat == "nothing":
                yield "model.remat full: layers are computed again instead of kept"
            yield f"mesh.context {2 * config.mesh.context}: a row's tokens are split over twice as many devices"
            if config.train.row_patches:
                yield f"train.row_patches {config.train.row_patches // 2}: half the images a row"
        if worst.argument_bytes >= worst.temporary_bytes:
            yield f"train.max_rows {config.train.max_rows // 2}: room for half the rows; a fuller step compiles again"
            if config.optimizer.moments == "float32":
                yield "optimizer.moments bfloat16: half the optimizer's memory"
        yield "a larger slice (topology, and mesh.fsdp with it)"
    if any(name not in ("update", "sft_step") for name in over):
        yield f"rollout.pages {max(config.rollout.pages // 2, 1)}, or fewer rollout.slots: a smaller key-value cache"
        if config.rollout.parameters == "gathered":
            yield "rollout.parameters sharded, or mesh.tensor 2: fewer parameters a chip while sampling"
        yield "smaller rollout.shapes: fewer tokens and patches are computed at a time"
