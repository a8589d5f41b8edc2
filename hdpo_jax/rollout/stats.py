"""Where the time of a rollout went, and how well the device was used."""

from dataclasses import astuple, dataclass, replace

import numpy as np

from hdpo_jax.rollout.engine import Chunk
from sharding.multihost import agree


@dataclass
class RolloutStats:
    """Of one batch of prompts. Seconds are those of the host: what it waited for."""

    decode_seconds: float = 0.0
    extend_seconds: float = 0.0
    wait_seconds: float = 0.0
    chunks: int = 0
    sampled_tokens: int = 0
    decode_steps: int = 0
    slot_steps: int = 0
    """Decode steps times slots: what could have been sampled."""
    computed_tokens: int = 0
    """Tokens of prompts and observations that were computed."""
    evictions: int = 0
    peak_pages: int = 0
    """The most pages of the cache that were held at a time, of all lanes together."""

    @property
    def occupancy(self) -> float:
        """Share of the decode steps' slots that sampled a token."""
        return self.sampled_tokens / max(self.slot_steps, 1)

    def count(self, chunk: Chunk) -> None:
        self.chunks += 1
        self.decode_steps += chunk.steps
        self.slot_steps += chunk.steps * len(chunk.counts)
        self.sampled_tokens += int(chunk.counts.sum())

    def of_all_processes(self) -> "RolloutStats":
        """Tokens, slots and pages added up; seconds, chunks and decode steps are those of the process that has most."""
        parts = agree(np.asarray(astuple(self), np.float64))
        most, total = RolloutStats(*parts.max(axis=0)), RolloutStats(*parts.sum(axis=0))
        return replace(
            total,
            decode_seconds=most.decode_seconds,
            extend_seconds=most.extend_seconds,
            wait_seconds=most.wait_seconds,
            chunks=most.chunks,
            decode_steps=most.decode_steps,
        )
