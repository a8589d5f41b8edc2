"""What is counted of TPU kernels, and of the memory that programs need, through the TPU's own compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hdpo_jax.config import DataConfig, ModelConfig, RLConfig, RolloutConfig
from hdpo_jax.plan.estimate import DoesNotFit, Estimate, estimate
from hdpo_jax.plan.hlo import Instruction, Module
from hdpo_jax.plan.kernels import kernel_costs
from hdpo_jax.plan.programs import Program, Setting
from hdpo_jax.plan.topology import GIB, Topology
from hdpo_jax.plan.workload import Workload
from models.qwen3_vl import MoEConfig, Qwen3VLConfig, TextConfig, VisionConfig, ragged
from models.qwen3_vl.grouped import grouped_matmul
from sharding import make_mesh

ONE_CHIP = Topology("v5e:2x2")
MOE = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
SIZES = Qwen3VLConfig(text=TextConfig(hidden_size=256, moe=MOE), vision=VisionConfig(out_hidden_size=256))
WORKLOAD = Workload(prompt=1_000, response=600, image=512, rows=1)


@pytest.fixture(scope="module")
def setting() -> Setting:
    paths = {"model": ModelConfig(path="unused"), "data": DataConfig(path="unused")}
    config = RLConfig(output="unused", rollout=RolloutConfig(slots=16), **paths)
    return Setting(config=config, sizes=SIZES, mesh=make_mesh({}, ONE_CHIP.devices()[:1]))


def arguments(setting: Setting, *shapes: tuple[int, ...], dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(setting.mesh, P())) for shape in shapes]


def call(name: str, result: str, given: str) -> Instruction:
    attributes = f', custom_call_target="tpu_custom_call", operand_layout_constraints={{{given}}}, metadata={{}}'
    return Instruction(name, "custom-call", result, (), attributes, is_root=False)


def test_experts_are_computed_for_their_own_rows_forward_and_backward(setting):
    """Also the gradient by their matrices, which the compiler would compute with every row for every expert."""
    rows, groups, inputs, outputs = 1_024, MOE.num_experts, 256, 128

    def loss(x, matrices, sizes):
        return (grouped_matmul(x, matrices, sizes).astype(jnp.float32) ** 2).sum()

    x, matrices = arguments(setting, (rows, inputs), (groups, inputs, outputs))
    (sizes,) = arguments(setting, (groups,), dtype=jnp.int32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, matrices, sizes).compile()
    module = Module(compiled.as_text() or "", trips={}, kernels=kernel_costs("update", setting, WORKLOAD))
    # Tiles of 128 rows; seven of them lie in two groups and are computed for both.
    tiles = rows // 128 + groups - 1
    assert module.cost.flops == 3 * 2 * tiles * 128 * inputs * outputs


def test_attention_to_pages_is_counted_by_what_is_looked_at(setting):
    """16 rows with a query each, eight of them at a time at each row's keys; the cache is not read as a whole."""
    given = "s32[16]{0}, s32[16,20]{1,0}, s32[17]{0}, bf16[16,8,128]{2,1,0}, bf16[9999,64,4,128]{3,2,1,0}"
    kernel = call("ragged_paged_attention_kernel.1", "bf16[16,8,128]{2,1,0}", given)
    found = kernel_costs("decode", setting, WORKLOAD)(kernel)
    keys = 1_000 + 600 / 2
    assert found.flops == 4 * 16 * 8 * keys * 8 * 128
    assert found.bytes == 2 * (16 * keys * 4 * 128 + 2 * 16 * 8 * 128)


def test_a_piece_of_a_prompt_is_counted_with_what_stands_before_it(setting):
    """One row of 512 tokens a lane: four heads share a key-value head, so 64 tokens are looked at at a time."""
    config = dataclasses.replace(setting.config, rollout=RolloutConfig(slots=16, shapes=((1, 512, 0),)))
    setting = dataclasses.replace(setting, config=config)
    given = "s32[1]{0}, s32[1,20]{1,0}, bf16[512,8,128]{2,1,0}, bf16[9999,64,4,128]{3,2,1,0}"
    kernel = call("ragged_paged_attention_kernel", "bf16[512,8,128]{2,1,0}", given)
    found = kernel_costs("prefill", setting, WORKLOAD)(kernel)
    assert ragged.BLOCK_QUERIES // 4 == 64
    keys = (1_000 - 512) / 2 + 512
    assert found.flops == 4 * 512 * keys * 8 * 128
    assert found.bytes == 2 * (512 / 64 * keys * 4 * 128 + 2 * 512 * 8 * 128)


def test_attention_of_rows_is_counted_by_phase(setting):
    given = "s32[1,4,4]{2,1,0}, bf16[8,4096,128]{2,1,0}, bf16[2,4096,128]{2,1,0}, bf16[2,4096,128]{2,1,0}"
    costs = kernel_costs("update", setting, WORKLOAD)
    causal = (4_096 + 1_024) / 2
    for phase, products in (("fwd_residuals", 2), ("dq_no_residuals", 3), ("dkv_no_residuals", 4)):
        found = costs(call(f"splash_mha_{phase}.3", "bf16[8,4096,128]{2,1,0}", given))
        assert found.flops == 2 * products * 8 * 4_096 * causal * 128
    images = costs(call("splash_mha_fwd_segmented_residuals", "bf16[8,4096,128]{2,1,0}", given))
    assert images.flops == 2 * 2 * 8 * 4_096 * (512 + 1_024) * 128
    assert costs(call("another", "bf16[8]{0}", given)).flops == 0


@pytest.mark.slow
def test_memory_is_what_the_compiler_refuses_programs_by(setting):
    """A loop of steps, each of whose parts takes memory that the next takes again: a sum would count both."""
    width = 8_192

    def of_rows(rows: int) -> Estimate:
        def loss(w, x):
            body = jax.checkpoint(lambda y, _: (jnp.tanh(y @ w), None))
            return (jax.lax.scan(body, x, None, length=4)[0] ** 2).sum()

        def steps(w, xs):
            return jax.lax.scan(lambda w, x: (w - jax.grad(loss)(w, x), None), w, xs.reshape(2, -1, width))[0]

        given = arguments(setting, (width, width), (rows, width), dtype=jnp.float32)
        program = Program(function=jax.jit(steps, donate_argnums=0), arguments=tuple(given))
        return estimate("sft_step", program, setting, ONE_CHIP)

    def needed(rows: int) -> float:
        return of_rows(rows).hbm_bytes

    per_row = (needed(65_536) - needed(32_768)) / 32_768
    limit = 15.75 * GIB  # of 16, by the compiler
    fitting = 65_536 + int((limit - needed(65_536)) / per_row) // 1_024 * 1_024
    assert needed(fitting - 4_096) < limit
    with pytest.raises(DoesNotFit) as refused:
        of_rows(fitting + 4_096)
    assert refused.value.needed == pytest.approx(needed(65_536) + per_row * (fitting + 4_096 - 65_536), rel=0.01)
