"""What one call of a TPU kernel does: its text says what it is given, the workload how much of that it looks at."""

import math
import re
from collections.abc import Callable, Mapping

from hdpo_jax.plan.hlo import Instruction, KernelCost, Kernels, dimensions
from hdpo_jax.plan.programs import Setting
from hdpo_jax.plan.workload import Workload
from models.qwen3_vl import ragged
from models.qwen3_vl.grouped import ROWS
from models.qwen3_vl.splash import BLOCKS

SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products of queries x keys x head size in each splash kernel."""
BF16 = 2
"""Bytes."""

Shapes = list[list[int]]
"""Of a kernel's arguments that are bf16 or f32, in order."""


def kernel_costs(program: str, setting: Setting, workload: Workload) -> Kernels:
    """Of the kernels in one of the run's programs; rows are full, images of full size."""
    by_name: Mapping[str, Callable[[Instruction, Shapes], KernelCost]] = {
        r"splash_mha_\w+": lambda call, given: _splash(call, given, workload),
        r"ragged_paged_attention": lambda call, given: _ragged(given, _rows(setting, program), program, workload),
        r"ragged-dot-none": lambda call, given: _grouped(_tile(call), given[-2], given[-1], setting),
        r"tgmm": lambda call, given: _grouped(ROWS, given[-2], dimensions(call.shape), setting),
    }

    def cost(call: Instruction) -> KernelCost:
        _, _, given = call.attributes.partition("operand_layout_constraints=")
        shapes = [dimensions(shape) for shape in re.findall(r"(?:bf16|f32)\[[\d,]*\]", given.partition("}}")[0])]
        # What is inlined goes by another name, but comes from the same place.
        counted = next((count for name, count in by_name.items() if re.search(name, _names(call))), None)
        return counted(call, shapes) if counted and shapes else KernelCost()

    return cost


def _names(call: Instruction) -> str:
    return f"{call.name} {call.scope}"


def _rows(setting: Setting, program: str) -> int:
    """Of slots that a device decodes, or of the rows that it extends at a time."""
    rows = setting.config.rollout.slots if program == "decode" else setting.extension(program)[0]
    return rows // setting.shards("slots")


def _splash(call: Instruction, given: Shapes, workload: Workload) -> KernelCost:
    """Attention of rows that are learned. Images see themselves; a causal row half of its keys."""
    phase = re.search(r"splash_mha_(fwd|dq|dkv)", _names(call))
    if phase is None:
        return KernelCost()
    # Behind what tells the blocks: queries, keys and values, heads first.
    (heads, queries, size), (_, keys, _) = given[:2]
    images = min(workload.image + BLOCKS[0], keys)
    # With half of the diagonal's blocks; the mean of the devices that share a row.
    seen = images if "_segmented" in _names(call) else (keys + BLOCKS[0]) / 2
    return KernelCost(flops=2.0 * SPLASH_PRODUCTS[phase[1]] * heads * queries * seen * size)


def _ragged(given: Shapes, rows: int, program: str, workload: Workload) -> KernelCost:
    """Attention to pages: a block of queries reads all that each of its rows has, and what comes later for nothing."""
    (tokens, heads, size), (_, _, keys_and_values, _) = given
    block = ragged.queries_per_block(tokens, rows, heads // (keys_and_values // 2))
    # Each block looks with all of its queries at each row that one of them is of.
    looks = max(rows, math.ceil(tokens / block))
    keys = workload.before(program, tokens // rows) + (tokens // rows if tokens > rows else 0)
    read = looks * keys * keys_and_values * size * BF16
    return KernelCost(flops=4.0 * looks * block * keys * heads * size, bytes=read + 2 * tokens * heads * size * BF16)


def _tile(call: Instruction) -> int:
    """Rows of a tile, as the compiler chose them."""
    found = re.search(r'ragged_dot_tiling="(\d+)', call.attributes)
    return int(found[1]) if found else ROWS


def _grouped(tile: int, rows: list[int], matrices: list[int], setting: Setting) -> KernelCost:
    """Grouped product of a mixture of experts, or its gradient; every expert is chosen as often as the others."""
    moe = setting.sizes.text.moe
    if moe is None:
        return KernelCost()
    groups, inputs, outputs = matrices
    # There is room for all pairs that may be here; if the experts are spread, most are elsewhere.
    tokens = rows[0] / min(moe.num_experts_per_tok, groups)
    here = tokens * moe.num_experts_per_tok * groups / moe.num_experts
    tiles = math.ceil(here / tile) + groups - 1  # one that two groups share is computed for each
    return KernelCost(flops=2.0 * tiles * tile * inputs * outputs)
