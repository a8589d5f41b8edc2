"""The plain jitted loop of the rollout benchmark: a batch at a time, in step, with a cache of full length a row.

The model's code, the sampling and its keys are ours, so it samples the same tokens. What it lacks is the scheduler:
rows that have stopped wait for the batch's last, all wait for its tools, and every rollout computes its own prompt.
"""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from hdpo_jax.rollout.engine import Extension, Programs, Running, make_programs, read_report
from hdpo_jax.rollout.prompts import PromptEncoder, Question
from hdpo_jax.types import ToolCall
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.images import feature_indices, pack_images
from tests.bench.rollout_ours import SlowTools, policy, prompts, rollout_config
from tests.bench.rollout_sizes import MAX_CALLS, MIXED

OBSERVATION_TOKENS = 64


@dataclass(eq=False)
class Trajectory:
    question: Question
    identity: tuple[int, int, int]
    token_ids: list[int]
    cached: int = 0
    calls: int = 0
    done: bool = False


def mixed(directory: str) -> dict[str, Any]:
    """One batch after another: seconds, tokens, decode steps."""
    loop = _loop(directory)
    started = time.perf_counter()
    trajectories = loop.start()
    steps = sum(loop.finish(trajectories[at : at + MIXED.rows]) for at in range(0, len(trajectories), MIXED.rows))
    return {
        "seconds": time.perf_counter() - started,
        "decode_steps": steps,
        "token_ids": [one.token_ids for one in trajectories],
    }


class Loop:
    def __init__(self, directory: str):
        loaded = policy(directory, True)
        self._processor, self._params, self._model = loaded.processor, loaded.params, loaded.model.config
        self._prompts = prompts(directory, MIXED)
        config = replace(
            rollout_config(MIXED),
            page=MIXED.capacity,
            chunk=MIXED.new_tokens,
            return_early=1.0,
            pages=MIXED.rows,
        )
        self._encode = PromptEncoder(self._processor, config)
        self._stops = [*([stop] for stop in self._processor.stop_ids), self._processor.tool_call_end]
        self._programs: Programs = make_programs(
            loaded.model,
            config,
            platform=loaded.mesh.devices.flat[0].platform,
            lanes=1,
            seed=0,
            stops=self._stops,
            end_id=self._processor.stop_ids[0],
            forbidden=self._processor.forbidden,
        )
        self._laid_out = self._programs.lay_out(self._params)
        self._table = unshared_table(MIXED.rows, 1)

    def start(self) -> list[Trajectory]:
        questions = [self._encode(prompt) for prompt in self._prompts]
        return [
            Trajectory(question, (0, group, sample), question.token_ids.tolist())
            for group, question in enumerate(questions)
            for sample in range(MIXED.samples)
        ]

    def finish(self, batch: list[Trajectory]) -> int:
        """Samples a batch to its end. Returns the decode steps it took."""
        cache, steps, tools = self._programs.empty_cache(), 0, SlowTools()
        cache, _ = self._programs.extend(self._params, cache, self._prompts_of(batch))
        while not all(one.done for one in batch):
            cache, report = self._programs.decode(self._laid_out, cache, self._running(batch))
            chunk = read_report(jax.device_get(report))
            steps += int(chunk.counts.max())
            asking = [one for row, one in enumerate(batch) if self._take(one, chunk.tokens[row, : chunk.counts[row]])]
            with ThreadPoolExecutor(MIXED.rows) as pool:
                answers = list(pool.map(tools.call, [ToolCall(name="", arguments={})] * len(asking)))
            for one, answer in zip(asking, answers, strict=True):
                self._observe(one, answer.text)
            if any(not one.done for one in asking):
                cache, _ = self._programs.extend(self._params, cache, self._appended(batch))
        return steps

    def _take(self, one: Trajectory, tokens: np.ndarray) -> bool:
        """Adds what was sampled. Returns whether a tool is to be called."""
        if one.done:
            return False
        one.token_ids += tokens.tolist()
        one.cached = len(one.token_ids) - 1
        spent = len(one.token_ids) >= MIXED.capacity
        calls = one.token_ids[-1] == self._processor.tool_call_end[-1]
        one.done = not calls or spent or one.calls >= MAX_CALLS
        one.calls += not one.done
        return not one.done

    def _observe(self, one: Trajectory, answer: str) -> None:
        turn = self._processor.observation_turn(answer)
        ids = [*self._processor.close_turn.tolist(), *turn.token_ids.tolist()]
        one.done = len(one.token_ids) + len(ids) >= MIXED.capacity
        if not one.done:
            one.token_ids += ids

    def _prompts_of(self, batch: list[Trajectory]) -> Extension:
        ids = np.stack([one.question.token_ids for one in batch])
        positions = np.stack([one.question.positions for one in batch])
        features = np.stack([feature_indices(row, self._model.image_token_id) for row in ids])
        images = pack_images(self._model, [one.question.images for one in batch], features, MIXED.patches)
        for one in batch:
            one.cached = len(one.token_ids) - 1
        arrays: list[Any] = [self._table, ids, positions, np.zeros(len(batch), np.int32), images]
        return Extension(*arrays)

    def _appended(self, batch: list[Trajectory]) -> Extension:
        """What is not in the cache yet, the last token excepted; a row without any computes a token again."""
        ids, start = np.zeros((len(batch), OBSERVATION_TOKENS), np.int32), np.zeros(len(batch), np.int32)
        for row, one in enumerate(batch):
            new = one.token_ids[one.cached : -1]
            ids[row, : len(new)], start[row] = new, one.cached
            one.cached = len(one.token_ids) - 1
        offset = np.array([self._offset(one) for one in batch])
        at = start[:, None] + np.arange(OBSERVATION_TOKENS) + offset[:, None]
        positions = np.repeat(at[..., None], 3, axis=2).astype(np.int32)
        arrays: list[Any] = [self._table, ids, positions, start, None]
        return Extension(*arrays)

    def _running(self, batch: list[Trajectory]) -> Running:
        recent = max(map(len, self._stops)) - 1
        active = np.array([not one.done for one in batch])
        numbers = [[one.token_ids[-1], len(one.token_ids), MIXED.capacity, self._offset(one)] for one in batch]
        pending, length, limit, offset = np.array(numbers, np.int32).T
        identity = np.array([one.identity for one in batch], np.int32)
        before = np.full((len(batch), recent), -1, np.int32)
        arrays: list[Any] = [self._table, pending, length, limit, offset, identity, before, active]
        return Running(*arrays, shared=None)

    def _offset(self, one: Trajectory) -> int:
        positions = one.question.positions
        return int(positions[-1, 0]) - (len(positions) - 1)


@functools.cache
def _loop(directory: str) -> Loop:
    return Loop(directory)
