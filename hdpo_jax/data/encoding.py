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
from models.qwen3_vl.video import Video


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
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Image.Image],
    videos: Sequence[Video],
    processor: PolicyProcessor,
) -> EncodedConversation:
    """Ids of a whole conversation: the prompt by the chat template, each later turn by extension.

    `messages` alternate between assistant and user after the prompt; their parts take `images` and `videos` in order.
    A turn that calls a tool ends at `</tool_call>`, any other at the end-of-turn token; both are learned, while
    prompts, observations and chat wrapper are not.
    """
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    unseen, unseen_videos = list(images), list(videos)

    def take(*messages: Mapping[str, Any]) -> tuple[list[Image.Image], list[Video]]:
        """What their parts show, which then is seen."""
        return (
            [unseen.pop(0) for message in messages for _ in range(count_parts(message, "image"))],
            [unseen_videos.pop(0) for message in messages for _ in range(count_parts(message, "video"))],
        )

    prompt = processor.encode_messages(messages[:first], *take(*messages[:first]), add_generation_prompt=True)
    ids = [prompt.token_ids]
    learned = [np.zeros(len(prompt.token_ids), bool)]
    encoded = list(prompt.images)

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
        elif count_parts(message, "video"):  # no tool shows one: a person's turn, in the order in which it is written
            turn = processor.user_turn(message, *take(message))
            extend(turn.token_ids, False)
            encoded.extend(turn.images)
        else:
            shown = [processor.encode_image(image) for image in take(message)[0]]
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


def count_parts(message: Mapping[str, Any], kind: str) -> int:
    """How many parts of a type a message has."""
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == kind for part in content)
