"""transformers' side of the GPU benchmark: SDPA, bf16, and torch.compile where it works."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers

from tests.bench.gpu_sizes import ROUNDS, Sizes


def decode(config: dict[str, Any], sizes: Sizes) -> dict[str, float]:
    """Seconds of a prefill of all rows and of a decode step, compiled over a static cache if that works."""
    model, ids = made(config), tokens(sizes.rows, sizes.prompt)

    def generated(count: int, compiled: bool) -> float:
        static = {"cache_implementation": "static"} if compiled else {}
        with torch.inference_mode():
            return timed(
                lambda: model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    max_new_tokens=count,
                    min_new_tokens=count,
                    pad_token_id=0,
                    **static,
                )
            )

    def measured(compiled: bool) -> dict[str, float]:
        for count in (sizes.new_tokens, 1):
            generated(count, compiled)
        first = [generated(1, compiled) for _ in range(ROUNDS)]
        whole = [generated(sizes.new_tokens, compiled) for _ in range(ROUNDS)]
        steps = sizes.new_tokens - 1
        return {
            "prefill": median(first),
            "decode": (median(whole) - median(first)) / steps,
            "compiled": float(compiled),
        }

    if torch.cuda.is_available():
        try:
            return measured(compiled=True)
        except Exception as error:
            # Whatever torch.compile does not know of this model: the plain loop is the peer then.
            print(f"without torch.compile: {str(error).splitlines()[0]}", flush=True)
    return measured(compiled=False)


def learn(config: dict[str, Any], sizes: Sizes) -> float:
    """Seconds of a step: rows one at a time, layers computed again, AdamW with moments as the weights, in bf16."""
    model = made(config)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=torch.cuda.is_available())
    rows = tokens(sizes.learned_rows, sizes.learned_tokens)

    def step() -> None:
        for row in rows:
            model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed(step)
    return median(timed(step) for _ in range(ROUNDS))


def made(config: dict[str, Any]) -> Any:
    """Random weights."""
    with torch.device(device()):
        known = transformers.Qwen3VLConfig.from_dict(config)
        model = transformers.Qwen3VLForConditionalGeneration._from_config(
            known, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1_000, (rows, length), generator=generator).to(device())


def name() -> str:
    """Of the device, as JAX calls it, too."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(function: Callable[[], Any]) -> float:
    _wait()
    started = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
