"""What training and sampling ask of a model: another architecture is a class with these, and a line in `families`.

Everything that knows of reinforcement learning is written against the three protocols here.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:  # `qwen3_vl` itself is typed with the first protocol.
    from PIL import Image

    from models.qwen3_vl.cache import Cache, SharedPages
    from models.qwen3_vl.config import TextConfig, VisionConfig
    from models.qwen3_vl.images import EncodedImage, PackedImages
    from models.qwen3_vl.processing import EncodedPrompt, Message, ObservationTurn
    from models.qwen3_vl.video import Video


class PolicyConfig(Protocol):
    """Sizes: what is computed on the host before the model sees it, and what the cache holds."""

    @property
    def text(self) -> "TextConfig":
        """The decoder: `vocab_size`, and layers, heads and head size of the key-value cache."""
        ...

    @property
    def vision(self) -> "VisionConfig | None":
        """How images become features; None: the model reads text only."""
        ...

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output matrix is the embedding table, transposed."""
        ...

    @property
    def image_token_id(self) -> int:
        """The token in whose place an image's feature stands; -1, which is no token, where there is none."""
        ...

    @property
    def video_token_id(self) -> int: ...


class PolicyModel(Protocol):
    """A decoder, an `nnx.Module`: its parameters are `nnx.Param`s that name their dimensions (`axes`, see `sharding`).

    Keys and values go into pages (`Cache`), of as many layers and heads as `config.text` says.
    """

    dtype: Any
    """Of activations and of the key-value cache."""

    @property
    def config(self) -> PolicyConfig: ...

    @property
    def head(self) -> Float[Array, "embed vocab"]:
        """The output matrix: log-probs are taken from hidden states and this, never from all logits at once."""
        ...

    def hidden_states(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens 3"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        prefix_ids: Int[Array, "batch tokens"] | None = None,
        images: "PackedImages | None" = None,
        experts: Int[Array, "batch tokens layers chosen"] | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """After the last norm, of whole rows: a token sees its own segment, and that of `prefix_ids`, up to itself.

        positions: M-RoPE's three; of text they are alike, and a model without images may take any one.
        experts: what `extend` told; never given to a model without.
        """
        ...

    def extend(
        self,
        input_ids: Int[Array, "batch tokens"],
        *,
        positions: Int[Array, "batch tokens 3"],
        cache: "Cache",
        table: Int[Array, "batch width"],
        start: Int[Array, " batch"],
        images: "PackedImages | None" = None,
        shared: "SharedPages | None" = None,
    ) -> "tuple[Float[Array, 'batch tokens embed'], Cache, Int[Array, 'batch tokens layers chosen'] | None]":
        """Hidden states of tokens that go on from what the cache holds at `start`, the cache with them in it, and the
        experts that they went through (`config.text.experts_a_token`); None where there are none."""
        ...

    def logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """In fp32."""
        ...


class PolicyProcessor(Protocol):
    """Messages, images, videos and tools' observations as token ids; what is in a trajectory is never encoded anew.

    What can not be encoded is a ValueError of one line: data skips the row, an observation goes without the image.
    """

    stop_ids: tuple[int, ...]
    """Tokens that end a turn; the first is the one that the chat template closes a turn with."""
    close_turn: Int[np.ndarray, " tokens"]
    """What ends an assistant turn that stopped right after `</tool_call>`."""
    after_end_of_turn: Int[np.ndarray, " tokens"]
    """The same where the policy itself sampled the end-of-turn token."""
    tool_call_end: tuple[int, ...]
    """The tokens of `</tool_call>`."""
    forbidden: Bool[np.ndarray, " vocabulary"]
    """Ids that may never be sampled."""

    @property
    def config(self) -> PolicyConfig: ...

    def encode_image(self, image: "Image.Image") -> "EncodedImage": ...

    def encode_text(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids of a text without any wrapper, special tokens in it as plain text."""
        ...

    def encode_messages(
        self,
        messages: "Sequence[Message]",
        images: "Sequence[Image.Image] | None" = None,
        videos: "Sequence[Video] | None" = None,
        *,
        add_generation_prompt: bool = True,
        tools: "Sequence[Mapping[str, Any]]" = (),
    ) -> "EncodedPrompt":
        """A conversation by the chat template; parts take `images` and `videos` in order, or, when None, their own.

        `tools`: schemas that the template is to describe."""
        ...

    def user_turn(
        self, message: "Message", images: "Sequence[Image.Image]", videos: "Sequence[Video]"
    ) -> "EncodedPrompt":
        """A later turn of the user, its parts in their order, and the start of the assistant's next turn."""
        ...

    def observation_turn(
        self, text: str, images: "Sequence[EncodedImage]" = (), max_tokens: int | None = None
    ) -> "ObservationTurn":
        """The turn that shows what a tool gave back, and the start of the assistant's next."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " tokens"], *, keep_special: bool = False) -> str: ...
