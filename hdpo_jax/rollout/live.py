"""A trajectory under way, as the host keeps it."""

from dataclasses import dataclass, field

import numpy as np

from hdpo_jax.rollout.prompts import Question
from hdpo_jax.rollout.scheduler import Sampled
from hdpo_jax.rollout.sources import Listener
from hdpo_jax.rollout.strands import Strand
from hdpo_jax.tools.protocol import TrajectoryTools
from hdpo_jax.types import StopReason, Trajectory, Turn


@dataclass(eq=False, kw_only=True)
class Live:
    """What a trajectory will be made of, beside the exact ids and images of its strand."""

    question: Question
    group: int
    sample: int
    strand: Strand
    sampled: list[bool]
    logprobs: list[float]
    sampled_logprobs: list[float]
    turns: list[Turn] = field(default_factory=list)
    calls: int = 0
    session: TrajectoryTools | None = None
    listener: Listener | None = None
    call_probabilities: list[float] = field(default_factory=list)
    held_back: bool = False
    """A call of the turn under way was answered instead."""

    @classmethod
    def start(
        cls, question: Question, group: int, sample: int, strand: Strand, listener: Listener | None = None
    ) -> "Live":
        nothing = [0.0] * strand.length
        return cls(
            question=question,
            group=group,
            sample=sample,
            strand=strand,
            sampled=[False] * strand.length,
            logprobs=list(nothing),
            sampled_logprobs=nothing,
            listener=listener,
        )

    def add_sampled(self, new: Sampled) -> None:
        """What its slot sampled; a last token that was forced was not."""
        self.logprobs += new.logprobs
        self.sampled_logprobs += new.sampled_logprobs
        self.sampled += [True] * len(new.tokens)
        self.sampled[-1] &= not new.forced

    def rewind(self, length: int) -> None:
        """Forgets what was sampled from `length` on."""
        for kept in (self.sampled, self.logprobs, self.sampled_logprobs):
            del kept[length:]

    def add_turn(self, turn: Turn) -> None:
        """A turn has ended."""
        self.turns.append(turn)
        self.held_back = False
        if self.listener:
            self.listener.turned(turn)

    def add_given(self, tokens: int) -> None:
        """Tokens that were not sampled."""
        self.logprobs += [0.0] * tokens
        self.sampled_logprobs += [0.0] * tokens
        self.sampled += [False] * tokens

    def finished(self, stop: StopReason) -> Trajectory:
        return Trajectory(
            prompt=self.question.prompt,
            group=self.group,
            sample=self.sample,
            token_ids=np.asarray(self.strand.token_ids, np.int32),
            sampled=np.asarray(self.sampled, bool),
            logprobs=np.asarray(self.logprobs, np.float32),
            sampled_logprobs=np.asarray(self.sampled_logprobs, np.float32),
            prompt_length=len(self.question.token_ids),
            images=self.strand.images,
            prompt_images=len(self.question.images),
            turns=self.turns,
            calls=self.calls,
            stop=stop,
            call_probabilities=self.call_probabilities,
            prompt_experts=self.strand.begun.experts if self.strand.begun else None,
            experts=self.strand.experts,
        )
