"""What the sides of the rollout benchmark have in common."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    prompts: int
    samples: int
    prompt_tokens: int
    """With the image's."""
    new_tokens: int
    """Of a rollout; where it may stop by itself, at most."""
    rows: int
    """Rollouts that decode at a time."""
    image_side: int = 256
    """Pixels."""

    @property
    def capacity(self) -> int:
        return self.prompt_tokens + self.new_tokens

    @property
    def patches(self) -> int:
        """Of an image of that side, 16 pixels a patch."""
        return (self.image_side // 16) ** 2


FIXED = Sizes(prompts=8, samples=4, prompt_tokens=256, new_tokens=128, rows=32)
"""Nothing stops before its budget is spent."""
MIXED = Sizes(prompts=8, samples=8, prompt_tokens=256, new_tokens=256, rows=16)
"""A turn ends by itself, half of them in a tool call."""
WAITING = Sizes(prompts=10, samples=8, prompt_tokens=128, new_tokens=384, rows=16)
GROUP = Sizes(prompts=1, samples=16, prompt_tokens=2_008, new_tokens=8, rows=16, image_side=1_024)
GROUP_PAGE = 32
"""Tokens: what a rollout has for itself is a page in part."""
TURN_TOKENS = 50
"""Mean of a turn that ends by itself."""
TOOL_SECONDS = 1.0
MAX_CALLS = 3
OBSERVATION = "nothing to see here"
LARGE = 2_048
"""Rows and columns of the product whose rate is taken for the cores' own."""
INPUTS = "inputs.npz"
"""What transformers continues, in the model's folder."""
