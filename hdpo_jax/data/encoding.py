"""Cold-start conversations as token ids, extended turn by turn exactly as a rollout would extend them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from hdpo_jax.tools.protocol import TOOL_CALL_END
from models.policy import PolicyProcessor
from models.qwen3_vl import EncodedImage


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """A conversation as the model sees it; `learned` marks what the policy itself would have sampled."""

    token_ids: Int[np.ndarray, " tokens"]
    learned: Bool[np.ndarray, " tokens"]
    images: Sequence[EncodedImage]

    @property
    def nbytes(self) -> int:
        return sum(image.patches.nbytes for image in self.images) + 5 * len(self.token_ids)


def encode_conversation(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], processor: PolicyProcessor
) -> EncodedConversation:
    """Ids of a whole conversation: the prompt by the chat template, each later turn by extension.

    `messages` alternate between assistant and user after the prompt; their image parts take `images` in order.
    A turn that calls a tool ends at `</tool_call>`, any other at the end-of-turn token; both are learned, while
    prompts, observations and chat wrapper are not.
    """
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    in_prompt = sum(count_images(message) for message in messages[:first])
    prompt = processor.encode_messages(messages[:first], images[:in_prompt], add_generation_prompt=True)
    ids = [prompt.token_ids]
    learned = [np.zeros(len(prompt.token_ids), bool)]
    encoded = list(prompt.images)
    unseen = list(images[in_prompt:])

    def extend(tokens: Int[np.ndarray, " tokens"], is_learned: bool) -> None:
        ids.append(np.asarray(tokens, np.int32))
        learned.append(np.full(len(tokens), is_learned))

    for i, message in enumerate(messages[first:], start=first):
        text = text_of(message)
        if message["role"] == "assistant":
            calls_tool = text.endswith(TOOL_CALL_END)
            extend(processor.encode_text(text), True)
            if not calls_tool:
                extend(np.asarray(processor.stop_ids[:1], np.int32), True)
            if i + 1 < len(messages):
                extend(processor.close_turn if calls_tool else processor.after_end_of_turn, False)
        else:
            count = count_images(message)
            shown = [processor.encode_image(image) for image in unseen[:count]]
            del unseen[:count]
            turn, kept, _ = processor.observation_turn(text, shown)
            extend(turn, False)
            encoded.extend(shown[:kept])
    return EncodedConversation(token_ids=np.concatenate(ids), learned=np.concatenate(learned), images=encoded)


def text_of(message: Mapping[str, Any]) -> str:
    """The text parts of a message, joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def count_images(message: Mapping[str, Any]) -> int:
    """How many image parts a message has."""
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
