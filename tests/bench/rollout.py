"""Rollouts of a 55M Qwen3-VL, fp32, all cores, same weights and prompts, an image a prompt: ours against transformers'
`generate`, which computes a prompt for each of its rollouts, and against a plain jitted loop: the same model code, as
many rows, but a batch at a time, which decodes until its last row stops and then waits for all its tools.

python -m tests.bench.rollout [--rounds 3]
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.bench.child import Child, median_ratio, take_turns
from tests.bench.rollout_sizes import FIXED, GROUP, GROUP_PAGE, LARGE, MIXED, TOOL_SECONDS, WAITING
from tests.bench.table import Row, markdown


def main(rounds: int) -> int:
    # Here and not above: a child imports this module too, and each side is to have its own libraries only.
    from tests.bench import rollout_ours, rollout_plain, rollout_torch

    with tempfile.TemporaryDirectory() as model, Child() as ours, Child() as peer, Child() as plain:
        with Child() as writer:
            writer.call(rollout_ours.prepare, Path(model))

        def timed(name: str, seconds: float) -> float:
            print(f"{name} {seconds:.2f} s", flush=True)
            return seconds

        prefill: list[float] = []
        steps: list[float] = []

        def whole_of_ours() -> float:
            found = ours.call(rollout_ours.fixed, model)
            prefill.append(timed("our prefill", found["prefill_seconds"]))
            steps.append(found["decode_seconds"] / found["decode_steps"])
            return timed("ours", found["seconds"])

        whole = take_turns(
            {
                "ours": whole_of_ours,
                "peer": lambda: timed("transformers", peer.call(rollout_torch.fixed, model)),
                "peer prefill": lambda: timed("transformers' prefill", peer.call(rollout_torch.prefill, model)),
            },
            rounds,
        )
        peaks = ours.peak_bytes() / 1e9, peer.peak_bytes() / 1e9
        found, expected = ours.call(rollout_ours.mixed, model), plain.call(rollout_plain.mixed, model)
        if found["token_ids"] != expected["token_ids"]:
            print("the plain loop samples other tokens: nothing to compare", file=sys.stderr)
            return 1
        mixed = take_turns(
            {
                "ours": lambda: timed("ours, mixed", ours.call(rollout_ours.mixed, model)["seconds"]),
                "peer": lambda: timed("plain loop, mixed", plain.call(rollout_plain.mixed, model)["seconds"]),
            },
            rounds,
        )
        group = ours.call(rollout_ours.group_of_one_prompt, model)
        print(f"groups {group}", flush=True)
        least = ours.call(rollout_ours.least_seconds, model)
        chunk = ours.call(rollout_ours.chunk_overhead, model)
        waiting = ours.call(rollout_ours.many_waiting, model)
        print(f"chunks {chunk}\nwaiting {waiting}", flush=True)

    tokens = FIXED.prompts * FIXED.samples * FIXED.new_tokens
    prompt_tokens = FIXED.prompts * FIXED.samples * FIXED.prompt_tokens
    whole["prefill"] = prefill
    whole["step"] = steps
    whole["peer step"] = [
        (all_of_it - first) / (FIXED.new_tokens - 1)
        for all_of_it, first in zip(whole["peer"], whole["peer prefill"], strict=True)
    ]
    seconds = {name: median(found) for name, found in whole.items()}
    what = f"{FIXED.prompts} prompts x {FIXED.samples}, {FIXED.prompt_tokens} + {FIXED.new_tokens} tokens"
    several = f"{MIXED.prompts * MIXED.samples} rollouts of mixed length, {MIXED.rows} at a time"
    rows = [
        Row(
            f"sampled tokens/s, prompts included ({what}; transformers)",
            tokens / seconds["ours"],
            tokens / seconds["peer"],
            median_ratio(whole["peer"], whole["ours"]),
            ">= 5x",
        ),
        Row(
            f"the same, were the decoder's products all, at the rate of {LARGE} x {LARGE} by {LARGE} (limit)",
            tokens / seconds["ours"],
            tokens / least,
            least / seconds["ours"],
        ),
        Row(
            f"a decode step of {FIXED.rows} rows (transformers)",
            1e3 * seconds["step"],
            1e3 * seconds["peer step"],
            median_ratio(whole["peer step"], whole["step"]),
            unit="ms",
        ),
        Row(
            "prompt tokens/s, those that are shared counted for each rollout (transformers)",
            prompt_tokens / seconds["prefill"],
            prompt_tokens / seconds["peer prefill"],
            median_ratio(whole["peer prefill"], whole["prefill"]),
        ),
        Row("peak memory (transformers)", *peaks, peaks[1] / peaks[0], unit="GB"),
        Row(
            f"{several}, tools of {TOOL_SECONDS:g} s (plain loop)",
            median(mixed["ours"]),
            median(mixed["peer"]),
            median_ratio(mixed["peer"], mixed["ours"]),
            ">= 3x",
            unit="s",
        ),
        Row(
            "decode steps for them, equal tokens (plain loop)",
            found["decode_steps"],
            expected["decode_steps"],
            expected["decode_steps"] / found["decode_steps"],
        ),
        Row(
            f"prompt tokens computed for {GROUP.samples} rollouts of a prompt of {GROUP.prompt_tokens} (unshared)",
            group["tokens"],
            group["unshared_tokens"],
            group["unshared_tokens"] / group["tokens"],
            ">= 12x",
        ),
        Row(
            f"key-value cache that holds them and {GROUP.new_tokens} tokens each, pages of {GROUP_PAGE} (unshared)",
            group["bytes"] / 1e6,
            group["unshared_bytes"] / 1e6,
            group["unshared_bytes"] / group["bytes"],
            ">= 12x",
            unit="MB",
        ),
        Row(
            "a decode step of them (unshared)",
            1e3 * group["step"],
            1e3 * group["unshared_step"],
            group["unshared_step"] / group["step"],
            unit="ms",
        ),
        Row(f"the host a chunk of {FIXED.rows} slots: planning, starting the program", 1e3 * chunk, unit="ms"),
        Row(
            f"decode capacity used, {WAITING.rows} slots, {WAITING.prompts * WAITING.samples} rollouts, tools of "
            f"{TOOL_SECONDS:g} s: while rollouts wait for a slot",
            100 * waiting["while_waiting"],
            target=">= 90 %",
            unit="%",
        ),
        Row("the same to the end of the last rollout", 100 * waiting["whole"], unit="%"),
        Row("time in which the device computes, while rollouts wait for a slot", 100 * waiting["busy"], unit="%"),
    ]
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="rollouts against transformers and a plain loop")
    parser.add_argument("--rounds", type=int, default=3)
    sys.exit(main(parser.parse_args().rounds))
