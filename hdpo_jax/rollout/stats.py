"""Where the time of a rollout went, and how well the device was used."""

from dataclasses import dataclass

from hdpo_jax.rollout.engine import Chunk


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
        steps = int(chunk.counts.max())
        self.chunks += 1
        self.decode_steps += steps
        self.slot_steps += steps * len(chunk.counts)
        self.sampled_tokens += int(chunk.counts.sum())
