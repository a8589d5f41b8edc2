"""Prompts as the model gets them: token ids, positions, patches; encoded ahead of their turn."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from hdpo_jax.config import RolloutConfig
from hdpo_jax.data.kept import Kept
from hdpo_jax.types import Prompt
from models.policy import PolicyProcessor
from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import mrope_positions
from models.qwen3_vl.pixels import load_image

ENCODERS = 2
"""Threads that encode prompts ahead of their turn."""


class PromptTooLong(ValueError):
    """A prompt has more tokens or image patches than a trajectory, or a static shape, holds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """An encoded prompt, one for all the rollouts of its group."""

    prompt: Prompt
    token_ids: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, "tokens 3"]
    images: Sequence[EncodedImage]

    @property
    def nbytes(self) -> int:
        images = sum(image.patches.nbytes for image in self.images)
        files = sum(map(len, self.prompt.images)) + sum(video.nbytes for video in self.prompt.videos)
        return images + files + 16 * len(self.token_ids)


class PromptEncoder:
    """Prompts -> questions. Those already encoded are kept, by id, while they fit `cache_mb` of host memory."""

    def __init__(self, processor: PolicyProcessor, config: RolloutConfig, *, cache_mb: int = 0):
        self._processor = processor
        self._config = config
        self._kept: Kept[Question] = Kept(cache_mb)

    def __call__(self, prompt: Prompt) -> Question:
        """Raises PromptTooLong where no static shape holds the prompt."""
        return self._kept.get(prompt.id, lambda: self._encode(prompt))

    def problem(self, prompt: Prompt) -> str | None:
        """Why the prompt can not be sampled, in words; None where it can."""
        try:
            self(prompt)
        except ValueError as error:
            return str(error)
        return None

    def _encode(self, prompt: Prompt) -> Question:
        if len(prompt.images) > self._config.patches:  # each has a patch at least
            raise PromptTooLong(f"{_named(prompt)} has {len(prompt.images)} images; expected fewer")
        images = _Decoded(prompt.images)
        encoded = self._processor.encode_messages(prompt.messages, images, prompt.videos, tools=prompt.tools)
        grids = [image.grid for image in encoded.images]
        positions, _ = mrope_positions(encoded.token_ids, grids, self._processor.config)
        self._require_room(prompt, len(encoded.token_ids), [len(image.patches) for image in encoded.images])
        return Question(prompt=prompt, token_ids=encoded.token_ids, positions=positions, images=encoded.images)

    def _require_room(self, prompt: Prompt, tokens: int, patches: Sequence[int]) -> None:
        config = self._config
        largest = max(patches, default=0)
        for found, what, most, setting in (
            (tokens, "tokens", config.capacity - 1, "rollout.capacity"),
            (sum(patches), "image patches", config.patches, "rollout.patches"),
            (largest, "patches in one image", config.image_patches, "rollout.shapes"),
        ):
            if found > most:
                raise PromptTooLong(f"{_named(prompt)} has {found} {what}; expected at most {most} ({setting})")


class _Decoded(Sequence[Image.Image]):
    """Image files, each decoded when it is asked for: all at a time, a stranger's small files may be very large."""

    def __init__(self, files: Sequence[bytes]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: Any) -> Any:
        return load_image(self._files[place])


def _named(prompt: Prompt) -> str:
    return f"prompt {prompt.id}" if prompt.id else "the prompt"


class Intake:
    """Encoded prompts in the order in which they are to start; those `ahead` are encoded while others run."""

    def __init__(self, encode: PromptEncoder, prompts: Sequence[Prompt], order: Sequence[int], *, ahead: int):
        self._encode = encode
        self._prompts = prompts
        self._ahead = ahead
        # A pool of its own: a prompt that is to fill a slot does not wait in line behind tool calls.
        self._pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._waiting = deque(order)
        self._encoding: deque[tuple[int, Future[Question]]] = deque()
        self._look_ahead()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._encoding)

    def pop(self) -> tuple[int, Question]:
        """The next prompt's number, and the prompt. Raises what its encoding raised."""
        number, question = self._encoding.popleft()
        self._look_ahead()
        return number, question.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _look_ahead(self) -> None:
        while self._waiting and len(self._encoding) < self._ahead:
            number = self._waiting.popleft()
            self._encoding.append((number, self._pool.submit(self._encode, self._prompts[number])))


def count_patches(images: Sequence[EncodedImage]) -> int:
    return sum(len(image.patches) for image in images)
