"""The named models against what is published of them: how many parameters."""

import math

import jax
import pytest
from flax import nnx

from models.qwen3_vl import Qwen3VL
from models.qwen3_vl.sizes import SIZES, published_config


def parameters(name: str) -> dict[tuple, int]:
    """Numbers in each parameter, by its path; nothing is allocated."""
    state = nnx.state(nnx.eval_shape(lambda: Qwen3VL(SIZES[name], rngs=nnx.Rngs(0))), nnx.Param)
    return {path: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(v)) for path, v in nnx.to_flat_state(state)}


# 4B, 8B, 32B: half the bytes (`total_size`) that model.safetensors.index.json on the hub gives for bfloat16 tensors.
# 2B: the count that transformers' `num_parameters()` gives for it. 30B-A3B: the hub's model page, rounded there.
@pytest.mark.parametrize(
    ("name", "published", "digit"),
    [
        ("2B", 2_127_532_032, 1),
        ("4B", 8_875_631_616 // 2, 1),
        ("8B", 17_534_247_392 // 2, 1),
        ("32B", 66_714_780_128 // 2, 1),
        ("30B-A3B", 31_070_000_000, 10_000_000),
    ],
)
def test_parameters_in_total(name, published, digit):
    assert abs(sum(parameters(name).values()) - published) <= digit / 2


# The cards of the language models that these are built on, Qwen3-30B-A3B and Qwen3-235B-A22B: "30.5B in total and 3.3B
# activated", "235B in total and 22B activated", 29.9B and 234B of them without embeddings.
@pytest.mark.parametrize(
    ("name", "total", "without_embeddings", "active"), [("30B-A3B", 30.5, 29.9, 3.3), ("235B-A22B", 235, 234, 22)]
)
def test_parameters_of_the_language_model_in_total_and_active(name, total, without_embeddings, active):
    text = {path: count for path, count in parameters(name).items() if path[0] != "vision"}
    moe = SIZES[name].text.moe
    assert moe is not None
    experts = sum(count for path, count in text.items() if path[-1] in ("gate_up", "down"))
    embeddings = sum(count for path, count in text.items() if path[0] in ("embedding", "output"))
    found = sum(text.values())
    idle = experts * (1 - moe.num_experts_per_tok / moe.num_experts)
    # To half of the last digit that is given; of 3.353B the card cuts the digits off.
    assert found / 1e9 == pytest.approx(total, abs=0.05 if total < 100 else 0.5)
    assert (found - embeddings) / 1e9 == pytest.approx(without_embeddings, abs=0.05 if total < 100 else 0.5)
    assert (found - idle) / 1e9 == pytest.approx(active, abs=0.06 if total < 100 else 0.5)


def test_instruct_and_thinking_models_have_one_size():
    for name, config in SIZES.items():
        for alias in (name, f"Qwen3-VL-{name}", f"Qwen/Qwen3-VL-{name}-Instruct", f"{name}-Thinking"):
            assert published_config(alias) is config
    with pytest.raises(
        ValueError, match="no published Qwen3-VL is named '7B'; expected one of 2B, 4B, 8B, 32B, 30B-A3B"
    ):
        published_config("7B")
