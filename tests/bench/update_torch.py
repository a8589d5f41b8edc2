"""The other side of the update benchmark: what a careful user of transformers and torch writes.

Rollouts are sorted by length and padded to the longest of their micro-batch; only the sampled tokens' logits are
computed; old log-probs of the first mini-batch are those of the pass that learns, as ours are.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn import functional

from tests.bench.workload import FIRST_SPECIAL, IMAGE, Rollout, Sizes, Workload, draw

CLIP, DUAL_CLIP, W_TOOL = 0.2, 3.0, 0.15


class MicroBatch(NamedTuple):
    inputs: dict[str, torch.Tensor]
    sampled: torch.Tensor
    """[rows, tokens]: where the next token is one that was sampled."""
    targets: torch.Tensor
    """[sampled tokens], as what follows."""
    acc: torch.Tensor
    tool: torch.Tensor


class Trainer:
    """Model, optimizer and the padded micro-batches of each mini-batch; `step` does one update."""

    def __init__(self, directory: str, sizes: Sizes, mini_batches: int, rows: int):
        work = draw(sizes)
        self._model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self._model.train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True
        )
        acc, tool = advantages(work)
        each = len(work.rollouts) // mini_batches
        self._mini_batches: list[list[MicroBatch]] = []
        for at in range(0, len(work.rollouts), each):
            by_length = sorted(work.rollouts[at : at + each], key=lambda rollout: len(rollout.token_ids))
            micros = [by_length[start : start + rows] for start in range(0, each, rows)]
            self._mini_batches.append([micro_batch(work, micro, acc, tool) for micro in micros])
        self.positions = sum(micro.inputs["input_ids"].numel() for mini in self._mini_batches for micro in mini)
        self.padding = 1 - sum(len(rollout.token_ids) for rollout in work.rollouts) / self.positions

    def step(self) -> dict[str, float]:
        """Means over the mini-batches of the loss, the gradient's norm and the negative log-likelihood."""
        with torch.no_grad():
            old = [[self._log_probs(micro) for micro in mini] for mini in self._mini_batches[1:]]
        found = [self._mini_step(mini, logp) for mini, logp in zip(self._mini_batches, [None, *old], strict=True)]
        names = ("loss", "grad_norm", "nll")
        return dict(zip(names, torch.tensor(found).mean(0).tolist(), strict=True))

    def _mini_step(self, mini: Sequence[MicroBatch], old: Sequence[torch.Tensor] | None) -> tuple[float, float, float]:
        acc_tokens = sum(len(micro.targets) for micro in mini)
        tool_tokens = max(1, sum(int((micro.tool != 0).sum()) for micro in mini))
        total, nll = 0.0, 0.0
        for number, micro in enumerate(mini):
            logp = self._log_probs(micro)
            before = logp.detach() if old is None else old[number]
            ratio = torch.exp((logp - before).clamp(-20, 20))
            counted = torch.where(micro.tool != 0, surrogate(ratio, micro.tool), 0.0)
            loss = surrogate(ratio, micro.acc).sum() / acc_tokens + W_TOOL * counted.sum() / tool_tokens
            loss.backward()
            total += loss.item()
            nll -= before.sum().item() / acc_tokens
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0).item()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, norm, nll

    def _log_probs(self, micro: MicroBatch) -> torch.Tensor:
        hidden = self._model.model(**micro.inputs).last_hidden_state[micro.sampled]
        logits = self._model.lm_head(hidden)
        logits[:, FIRST_SPECIAL:] = -torch.inf
        return -functional.cross_entropy(logits, micro.targets, reduction="none")


def surrogate(ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    return torch.where(advantages < 0, torch.minimum(loss, -DUAL_CLIP * advantages), loss)


def advantages(work: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """[prompts, samples] each: accuracy over the group, tool use over its correct rollouts."""
    accuracy, tool = torch.tensor(work.accuracy), torch.tensor(work.tool)
    acc, frugal = torch.zeros_like(accuracy), torch.zeros_like(tool)
    for group in range(len(accuracy)):
        acc[group] = standardised(accuracy[group])
        right = accuracy[group] > 0.5
        frugal[group, right] = standardised(tool[group, right])
    return acc, frugal


def standardised(rewards: torch.Tensor) -> torch.Tensor:
    if len(rewards) < 2 or rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def micro_batch(work: Workload, rollouts: Sequence[Rollout], acc: torch.Tensor, tool: torch.Tensor) -> MicroBatch:
    """Padded on the right, where causal attention does not look: no mask is needed, and attention is faster without."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.token_ids).long() for r in rollouts], batch_first=True)
    learned = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.sampled) for r in rollouts], batch_first=True)
    sampled = functional.pad(learned[:, 1:], (0, 1))
    counts = sampled.sum(-1)

    def each_token(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values[r.group, r.sample] for r in rollouts]).repeat_interleave(counts)

    inputs = {
        "input_ids": ids,
        "pixel_values": torch.cat([torch.tensor(work.patches[r.group]) for r in rollouts]),
        "image_grid_thw": torch.tensor([work.grid] * len(rollouts)),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return MicroBatch(inputs, sampled, ids[:, 1:][learned[:, 1:]], each_token(acc), each_token(tool))


@functools.cache
def trainer(directory: str, sizes: Sizes, mini_batches: int, rows: int) -> Trainer:
    return Trainer(directory, sizes, mini_batches, rows)


def first(*given: Any) -> dict[str, float]:
    """The first update: what it found, and how long it took."""
    theirs = trainer(*given)
    started = time.perf_counter()
    found = theirs.step()
    seconds = time.perf_counter() - started
    return {**found, "seconds": seconds, "padding": theirs.padding, "positions": theirs.positions}


def again(*given: Any) -> float:
    """Seconds of a further update."""
    theirs = trainer(*given)
    started = time.perf_counter()
    theirs.step()
    return time.perf_counter() - started
