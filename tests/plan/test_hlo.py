"""What is counted in a compiled program, against what it was written to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hdpo_jax.plan.hlo import Instruction, KernelCost, Module, dimensions
from sharding import make_mesh

# Products as the TPU's compiler writes them: plain, over two dimensions with a window, batched as a sliding window.
TPU_TEXT = """\
HloModule jit_f, num_partitions=4

%body (arg: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %arg = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %w = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %y = bf16[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %y)
}

%condition (arg.1: (s32[], bf16[8,16])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %bound = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %last = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
  %k = bf16[4,16,2]{2,1,0} constant({...})
  %summed = bf16[8,16,1]{1,0,2} convolution(%last, %k), window={size=2}, dim_labels=b0f_oi0->bf0
  %slid = bf16[8,4,16]{2,0,1} convolution(%last, %k), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
  ROOT %all = bf16[32,16]{1,0} all-gather(%last), replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={0}
}
"""

# A cache that is written in place, a slice of it that a fusion within a fusion takes, and a kernel whose attributes go
# on over several lines.
IN_PLACE_TEXT = """\
HloModule jit_g

%sliced (cache.1: bf16[64,128], at.1: s32[]) -> bf16[1,128] {
  %cache.1 = bf16[64,128]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  ROOT %slice = bf16[1,128]{1,0} dynamic-slice(%cache.1, %at.1, %at.1), dynamic_slice_sizes={1,128}
}

%read (cache.2: bf16[64,128], at.2: s32[]) -> bf16[1,128] {
  %cache.2 = bf16[64,128]{1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  %inner = bf16[1,128]{1,0} fusion(%cache.2, %at.2), kind=kLoop, calls=%sliced
  ROOT %twice = bf16[1,128]{1,0} add(%inner, %inner)
}

%written (cache.3: bf16[64,128], at.3: s32[1], row.3: bf16[1,128]) -> bf16[64,128] {
  %cache.3 = bf16[64,128]{1,0} parameter(0)
  %at.3 = s32[1]{0} parameter(1)
  %row.3 = bf16[1,128]{1,0} parameter(2)
  ROOT %scatter = bf16[64,128]{1,0} scatter(%cache.3, %at.3, %row.3), to_apply=%sum
}

ENTRY %main (cache: bf16[64,128], at: s32[], place: s32[1]) -> bf16[64,128] {
  %cache = bf16[64,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %place = s32[1]{0} parameter(2)
  %row = bf16[1,128]{1,0} fusion(%cache, %at), kind=kLoop, calls=%read
  %new = bf16[1,128]{1,0} custom-call(%row, %cache), custom_call_target="tpu_custom_call", more={data={
"layout": 1
}}, metadata={op_name="jit(g)/look/pallas_call"}
  ROOT %next = bf16[64,128]{1,0} fusion(%cache, %place, %new), kind=kCustom, calls=%written
}
"""


def nothing(_: Instruction) -> KernelCost:
    return KernelCost()


def text_of(program, *arguments) -> str:
    text = program.lower(*arguments).compile().as_text()
    assert text is not None
    return text


def test_the_tpu_compilers_text():
    module = Module(TPU_TEXT, trips={}, kernels=nothing)
    # Counted in twos up to 10, five times; once it would be a fifth.
    looped = 5 * 2 * 8 * 16 * 16
    # A window without padding is summed over; one that slides over padding has one place that counts.
    summed, slid = 2 * 8 * 16 * 16 * 2, 2 * 8 * 4 * 16 * 2
    assert module.cost.flops == looped + summed + slid
    assert module.cost.collectives == {"all-gather": 32 * 16 * 2 * 3 / 4}
    assert module.unknown_loops == set()


def test_what_is_sliced_or_written_in_place_moves_no_more_than_that():
    seen = []

    def kernel(call: Instruction) -> KernelCost:
        seen.append(call.scope)
        return KernelCost(flops=7, bytes=1_000)

    cost = Module(IN_PLACE_TEXT, trips={}, kernels=kernel).cost
    row, index = 128 * 2, 4
    # Read and given; by the kernel's own account; written from what was given, and where to.
    assert cost.bytes == (row + index + row) + 1_000 + (index + row + row)
    assert cost.flops == 7
    assert set(seen) == {"jit(g)/look/pallas_call"}


def test_loops_are_multiplied_out():
    def of_rows(x, w, count):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        with jax.named_scope("rounds"):
            return jax.lax.fori_loop(0, count, lambda _, x: jax.lax.scan(layer, x, w)[0], x)

    x, w = jnp.ones((16, 32)), jnp.ones((5, 32, 32))
    text = text_of(jax.jit(of_rows), x, w, 3)
    product = 2 * 16 * 32 * 32
    assert Module(text, trips={"rounds": 7}, kernels=nothing).cost.flops == 7 * 5 * product
    unknown = Module(text, trips={}, kernels=nothing)
    assert unknown.cost.flops == 5 * product
    assert [scope.endswith("rounds/while") for scope in unknown.unknown_loops] == [True]


@pytest.mark.parametrize(
    ("layout", "kind", "sent"),
    [
        (P("fsdp", None), "all-gather", 64 * 64 * 4 * 7 / 8),  # the weights come to the rows
        (P(None), None, 0),
    ],
)
def test_collectives_are_what_a_device_sends(layout, kind, sent):
    mesh = make_mesh({"fsdp": 8})
    rows = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    weights = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, layout))
    program = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P("fsdp")))
    cost = Module(text_of(program, rows, weights), trips={}, kernels=nothing).cost
    assert cost.flops == 2 * 512 * 64 * 64 / 8
    assert dict(cost.collectives) == ({kind: sent} if kind else {})


def test_shapes():
    assert dimensions("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}") == [2, 3]
    assert dimensions("f32[]") == []
    assert np.prod(dimensions("(f32[4,5]{1,0}, s32[])")) == 20
