"""The nouns of an agentic RL run: prompt, tool call, observation, turn, trajectory, packed rows."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from models.qwen3_vl.images import EncodedImage, PackedImages
from models.qwen3_vl.video import Video


class StopReason(enum.Enum):
    """Why a trajectory ended."""

    END_OF_TURN = "end_of_turn"
    """The policy closed its turn without a tool call: the normal end, an answer."""
    TOKEN_BUDGET = "token_budget"
    """The next token would not fit the trajectory's response budget, or the slot's capacity."""
    CALL_LIMIT = "call_limit"
    """The policy asked for one call more than allowed; that call was not sent."""
    DROPPED = "dropped"
    """The world failed (the tool server was lost): the rollout is masked out of the update."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question: chat messages with `<image>` and `<video>` marks resolved to parts, and what is right."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    """Roles and contents as a chat template takes them; image parts are `{"type": "image"}`, in order."""
    images: Sequence[bytes]
    """The original image files (JPEG, PNG…), full resolution, in the order of the image parts."""
    videos: Sequence[Video] = ()
    """In the order of the video parts. Tools do not get them."""
    ground_truth: str | Sequence[str]
    """What a right answer says; of several, any may match."""
    data_source: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Names under which data sets know it, the likeliest first: caches that come with the data are kept by them."""
        named = [self.extra.get(name) for name in ("data_idx", "cache_id", "image_id", "index", "id", "image_url")]
        return [*dict.fromkeys(str(name) for name in named if isinstance(name, str | int)), self.id]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A request the policy wrote between `<tool_call>` and `</tool_call>`; `error` says what is malformed."""

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a tool call gave back: text, images, and whether the call itself succeeded."""

    text: str
    images: Sequence[Image.Image] = ()
    ok: bool = True
    lost: bool = False
    """The tool's server is gone: the rollout can not be judged and is dropped from the update."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One stretch of a trajectory for people to read: who spoke, the text, the images shown."""

    role: str
    text: str
    images: Sequence[Image.Image] = ()


@dataclass(kw_only=True)
class Trajectory:
    """A finished rollout, token-exact: `token_ids` are what the policy saw and sampled, never re-encoded."""

    prompt: Prompt
    group: int
    """The prompt's number in its step."""
    sample: int
    """Index of the rollout in its group."""
    token_ids: Int[np.ndarray, " tokens"]
    sampled: Bool[np.ndarray, " tokens"]
    """Which tokens the policy sampled; the rest is prompt, chat wrapper and observations."""
    logprobs: Float[np.ndarray, " tokens"]
    """The sampler's log-probabilities of the sampled tokens under the policy: at the sampling temperature, nothing
    truncated; 0 elsewhere."""
    sampled_logprobs: Float[np.ndarray, " tokens"]
    """The same under the distribution that the tokens were drawn from: truncated by top-k, top-p and min-p."""
    prompt_length: int
    images: Sequence[EncodedImage]
    """The prompt's images and what its videos show, then the images of observations, in token order."""
    prompt_images: int
    turns: Sequence[Turn]
    """Assistant and tool turns after the prompt."""
    calls: int
    """Every tool call sent: malformed, unknown, refused, timed-out and failed ones count too."""
    stop: StopReason
    prompt_experts: Int[np.ndarray, "prompt_but_one layers chosen"] | None = None
    """Those that the prompt's tokens went through, its last one left out; one array for all that go on from it. None:
    not recorded, or there are no such tokens."""
    experts: Int[np.ndarray, "response layers chosen"] | None = None
    """Those of the prompt's last token and of all behind it, the very last left out; None: not recorded."""

    @property
    def usable(self) -> bool:
        """False: dropped, through no fault of the policy's."""
        return self.stop is not StopReason.DROPPED

    @property
    def response_text(self) -> str:
        """What the policy wrote, all turns joined; nothing that a tool wrote."""
        return "\n".join(turn.text for turn in self.turns if turn.role == "assistant")


class PackedRows(NamedTuple):
    """Token rows as the trainer sees them: several segments a row, a prompt once for all its rollouts.

    A response segment starts with the prompt's last token (the one that predicts the first sampled token)
    and sees its own segment and the segment named in `prefix_ids`. Leading axes may stand before `rows`.
    """

    token_ids: Int[Array, "rows tokens"]
    positions: Int[Array, "rows tokens 3"]
    """M-RoPE positions: time, height, width."""
    segment_ids: Int[Array, "rows tokens"]
    """0 is padding; ids are unique within a row."""
    prefix_ids: Int[Array, "rows tokens"]
    """The other segment that a token sees; its own id where there is none."""
    targets: Int[Array, "rows tokens"]
    """The token that each position predicts."""
    loss_mask: Bool[Array, "rows tokens"]
    """True where the target is a token that the policy sampled (RL) or is to learn (SFT)."""
    rollout: Int[Array, "rows tokens"]
    """Which rollout of the batch (group * G + sample) a position belongs to; 0 where the mask is False."""
    logprobs: Float[Array, "rows tokens"]
    """The sampler's log-probability of the target, nothing truncated; 0 where the mask is False."""
    sampled_logprobs: Float[Array, "rows tokens"]
    """The same under the distribution that the target was drawn from."""
    images: PackedImages | None
    experts: Int[Array, "rows tokens layers chosen"] | None = None
    """Those that the tokens are to go through; None: the router chooses."""
