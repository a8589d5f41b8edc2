"""Prompts as the model gets them: token ids, positions, patches, and the static shape that holds them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hdpo_jax.config import RolloutConfig
from hdpo_jax.data.kept import Kept
from hdpo_jax.types import Prompt
from models.qwen3_vl import EncodedImage
from models.qwen3_vl.images import mrope_positions
from models.qwen3_vl.processing import Processor, load_image


class PromptTooLong(ValueError):
    """A prompt has more tokens or image patches than any of `rollout.prompt_shapes` holds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """An encoded prompt, one for all the rollouts of its group."""

    prompt: Prompt
    token_ids: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, "tokens 3"]
    images: Sequence[EncodedImage]
    shape: tuple[int, int]
    """Static tokens and patches that it is padded to."""

    @property
    def nbytes(self) -> int:
        images = sum(image.patches.nbytes for image in self.images)
        return images + sum(map(len, self.prompt.images)) + 16 * len(self.token_ids)


class PromptEncoder:
    """Prompts -> questions. Those already encoded are kept, by id, while they fit `cache_mb` of host memory."""

    def __init__(self, processor: Processor, config: RolloutConfig, *, cache_mb: int = 0):
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
        images = [load_image(image) for image in prompt.images]
        encoded = self._processor.encode_messages(prompt.messages, images)
        grids = [image.grid for image in encoded.images]
        positions, _ = mrope_positions(encoded.token_ids, grids, self._processor.config)
        tokens, patches = len(encoded.token_ids), count_patches(encoded.images)
        shape = shape_for(self._config.prompt_shapes, tokens - 1, patches)
        if tokens >= self._config.capacity or shape is None:
            raise PromptTooLong(
                f"prompt {prompt.id} has {tokens} tokens and {patches} image patches; expected at most one of "
                f"rollout.prompt_shapes {list(self._config.prompt_shapes)} and fewer than rollout.capacity "
                f"{self._config.capacity} tokens"
            )
        return Question(
            prompt=prompt, token_ids=encoded.token_ids, positions=positions, images=encoded.images, shape=shape
        )


def count_patches(images: Sequence[EncodedImage]) -> int:
    return sum(len(image.patches) for image in images)


def shape_for(shapes: Sequence[tuple[int, int]], tokens: int, patches: int) -> tuple[int, int] | None:
    """The first static shape that holds so many tokens and patches; None where none does."""
    return next((shape for shape in shapes if tokens <= shape[0] and patches <= shape[1]), None)
