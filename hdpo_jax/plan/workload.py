"""What a plan assumes that a run does, and the operations that the model needs for it."""

from dataclasses import dataclass

from hdpo_jax.config import RLConfig
from models.qwen3_vl import Qwen3VLConfig

IMAGE_TOKENS = 5_120
"""Tokens of a full image, as the authors' tools return them (arXiv:2604.08545, released settings)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step in which every budget is spent: rows full of one trajectory each, and of full images."""

    prompt: int
    """Tokens."""
    response: int
    image: int
    """Patches of an image, at most."""
    rows: int
    """Packed rows of a step."""

    @classmethod
    def of(cls, config: RLConfig, sizes: Qwen3VLConfig) -> "Workload":
        response = min(config.agent.max_response_tokens, config.train.row_tokens - 1)
        return cls(
            prompt=config.train.row_tokens - response,
            response=response,
            image=min(IMAGE_TOKENS * sizes.vision.spatial_merge_size**2, config.rollout.image_patches),
            rows=config.train.max_rows,
        )

    @property
    def tokens(self) -> int:
        return self.prompt + self.response

    def before(self, program: str, tokens: int) -> float:
        """Tokens of a row, on average, that stand before the `tokens` which a program computes of it at a time."""
        known = {
            "prefill": max(self.prompt - tokens, 0) / 2,  # piece by piece
            "append": self.prompt,
            "decode": self.prompt + self.response / 2,
        }
        return known.get(program, 0)

    def keys(self, program: str, tokens: int = 1) -> float:
        """That each of those tokens sees, on average."""
        return self.before(program, tokens) + (tokens / 2 if tokens > 1 else 0)


@dataclass(frozen=True)
class Need:
    """Operations of a forward pass; two a multiplication that is added up."""

    sizes: Qwen3VLConfig

    def tokens(self, tokens: float, keys: float) -> float:
        """Of tokens that see `keys` keys each, through the decoder."""
        text = self.sizes.text
        size, heads = text.head_dim, text.num_attention_heads
        attention = text.hidden_size * size * (2 * heads + 2 * text.num_key_value_heads)
        layer = attention + self._mlp()
        return tokens * text.num_hidden_layers * (2 * layer + 4 * keys * heads * size)

    def logits(self, tokens: float) -> float:
        return 2 * tokens * self.sizes.text.hidden_size * self.sizes.text.vocab_size

    def patches(self, patches: float, image: float) -> float:
        """Of patches in images of `image` patches, through the vision tower and its mergers."""
        vision = self.sizes.vision
        layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        tower = vision.depth * (2 * layer + 4 * image * vision.hidden_size) + 2 * vision.patch_dim * vision.hidden_size
        merger = 2 * (vision.merged_size**2 + vision.merged_size * vision.out_hidden_size)
        mergers = (1 + len(vision.deepstack_visual_indexes)) * merger / vision.spatial_merge_size**2
        return patches * (tower + mergers)

    def _mlp(self) -> float:
        """Multiplications of a token in a layer's MLP: with experts, of those that it is sent to, and the router's."""
        text, moe = self.sizes.text, self.sizes.text.moe
        if moe is None:
            return 3 * text.hidden_size * text.intermediate_size
        return text.hidden_size * (3 * moe.num_experts_per_tok * moe.moe_intermediate_size + moe.num_experts)
