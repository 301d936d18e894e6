"""What is counted in stored programs."""

import pytest

from mmprm_jax.fit import hlo, jobs

HLO = """
%body (p: (f32[8,4])) -> (f32[8,4]) {
  %p = (f32[8,4]{1,0}, f32[2,4]{1,0}, s32[]) parameter(0)
  %big = f32[8,4]{1,0} get-tuple-element(%p), index=0
  %small = f32[2,4]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %at = s32[]{:S(2)} get-tuple-element(%p), index=2
  %start = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%big)
  %done = f32[8,4]{1,0:S(1)} copy-done(%start)
  %sum = f32[8,4]{1,0} add(%done, %done)
  %rows = f32[2,4]{1,0:S(1)} fusion(%sum, %at), kind=kLoop, calls=%take
  %put = f32[8,4]{1,0} fusion(%sum, %rows, %at), kind=kLoop, calls=%place
  ROOT %out = (f32[8,4]{1,0}, f32[2,4]{1,0:S(1)}, s32[]) tuple(%put, %rows, %at)
}
%take (a: f32[8,4], b: s32[]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %slice = f32[2,4]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={2,4}
}
%place (a: f32[8,4], u: f32[2,4], b: s32[]) -> f32[8,4] {
  %a.1 = f32[8,4]{1,0} parameter(0)
  %u = f32[2,4]{1,0} parameter(1)
  %b.1 = s32[] parameter(2)
  ROOT %dus = f32[8,4]{1,0} dynamic-update-slice(%a.1, %u, %b.1, %b.1)
}
%condition (q: (f32[8,4])) -> pred[] {
  %q = (f32[8,4]{1,0}, f32[2,4]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=2
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = (f32[8,4]{1,0}, f32[2,4]{1,0}, s32[]) parameter(0)
  ROOT %while = (f32[8,4]{1,0}, f32[2,4]{1,0:S(1)}, s32[]) while(%x), condition=%condition, body=%body
}
"""


def test_hbm_bytes():
    program = hlo.parse(HLO)
    assert hlo.outer_loop(program) == "body"
    # The copy on to the chip reads 128, the sum writes 128, the slice reads 32, the update reads and writes 32.
    assert hlo.sum_bytes(program, "body") == 128 + 128 + 32 + 2 * 32
    assert hlo.sum_bytes(program, "main") == 5 * 352
    assert [size for size, _ in hlo.largest(program, "body", 4)] == [128, 128, 64, 32]


def test_trips():
    """Counted from the constant that ends a loop and from the step of its counter."""
    unrolled = HLO.replace("%put, %rows, %at)", "%put, %rows, %next)").replace(
        "  %start =", "  %two = s32[] constant(2)\n  %next = s32[] add(%at, %two)\n  %start ="
    )
    program = hlo.parse(unrolled)
    once = hlo.sum_bytes(program, "body")
    assert hlo.sum_bytes(program, "main") == 3 * once  # 0, 2, 4
    assert hlo.entry(unrolled) == "main"


ASYNC = """
%take (t: bf16[4096,64], n: s32[8]) -> bf16[8,64] {
  %t = bf16[4096,64]{1,0} parameter(0)
  %n = s32[8]{0:S(2)} parameter(1)
  ROOT %rows = bf16[8,64]{1,0} gather(%t, %n), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,64}
}, execution_thread="sparsecore"
%called (t.2: bf16[4096,64], n.2: s32[8]) -> bf16[8,64] {
  %t.2 = bf16[4096,64]{1,0} parameter(0)
  %n.2 = s32[8]{0:S(2)} parameter(1)
  ROOT %call = bf16[8,64]{1,0} call(%t.2, %n.2), to_apply=%take
}, execution_thread="sparsecore"
%offloaded (t.1: bf16[4096,64], n.1: s32[8]) -> bf16[8,64] {
  %t.1 = bf16[4096,64]{1,0} parameter(0)
  %n.1 = s32[8]{0:S(2)} parameter(1)
  ROOT %custom-call = bf16[8,64]{1,0} custom-call(%t.1, %n.1), custom_call_target="x", called_computations={%called}
}, execution_thread="sparsecore"
%piece (p: bf16[16,64]) -> bf16[2,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  ROOT %part = bf16[2,64]{1,0:S(1)} slice(%p), slice={[0:2], [0:64]}
}
ENTRY %main (a: bf16[4096,64], b: s32[8], c: bf16[16,64]) -> bf16[8,64] {
  %a = bf16[4096,64]{1,0} parameter(0)
  %b = s32[8]{0:S(2)} parameter(1)
  %c = bf16[16,64]{1,0} parameter(2)
  %slice-start = ((bf16[16,64]{1,0}), bf16[2,64]{1,0:S(1)}, s32[]{:S(2)}) async-start(%c), calls=%piece
  %slice-done = bf16[2,64]{1,0:S(1)} async-done(%slice-start)
  %start = ((), (), (s32[99]{0:T(1024)}, s32[25]{0:T(1)S(11)}, /*index=5*/s32[0]{0})) async-start(), \
async_execution_thread="sparsecore", calls=%offloaded
  %update = ((bf16[4096,64]{1,0}, s32[8]{0:S(2)}), bf16[8,64]{1,0}, (s32[99]{0})) async-update(%start, %a, %b), \
output_to_operand_aliasing={{2,0}: (0, {2,0})}
  ROOT %done = bf16[8,64]{1,0} async-done(%update)
}
""".replace("\\\n", "")


def test_asynchronous():
    """Work that runs beside the rest, some of it on a sparse core that gets its operands in an update, counts once."""
    program = hlo.parse(ASYNC)
    # of 16 rows two are read, on to the chip; of 4096 eight are read and written
    assert hlo.sum_bytes(program, "main") == 2 * 64 * 2 + 2 * (8 * 64 * 2)
    assert program["main"]["update"].operands == ("start", "a", "b")


def line(text):
    return hlo.parse(f"ENTRY %main (x: s32[]) -> s32[] {{\n{text}\n}}\n")


@pytest.mark.parametrize(
    "lhs, rhs, out, attributes, want",
    [
        # a product with two batch-like dimensions on the left
        ("[8,128,64]", "[64,32,1]", "[8,128,32]", "window={size=1}, dim_labels=0bf_io0->0bf", 8 * 128 * 64 * 32),
        # a gradient: both are contracted over the 8, a window as long as the input
        ("[8,128,64]", "[8,128,32]", "[64,32,1]", "window={size=8}, dim_labels=0fb_0io->bf0", 8 * 128 * 64 * 32),
        # a batched product: of 4 x 4 pairs of positions, each output meets one
        (
            "[4,16,32]", "[4,32,8]", "[4,16,8]", "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            4 * 16 * 32 * 8,
        ),
        # a true convolution that keeps the size: the first and the last output see two of the three
        ("[2,5,3]", "[3,3,7]", "[2,5,7]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (3 * 5 - 2) * 3 * 7),
    ],
)  # fmt: skip
def test_convolutions(lhs, rhs, out, attributes, want):
    program = line(
        f"%a = bf16{lhs} parameter(0)\n%b = bf16{rhs} parameter(1)\n"
        f"ROOT %c = bf16{out}{{1,0}} convolution(%a, %b), {attributes}, metadata={{}}"
    )
    assert hlo.sum_flops(program, "main") == 2 * want


def test_dot():
    program = line(
        "%a = f32[4,6]{1,0} parameter(0)\n%b = f32[6,5]{1,0} parameter(1)\n"
        "ROOT %c = f32[4,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    )
    assert hlo.sum_flops(program, "main") == 2 * 4 * 6 * 5


COLLECTIVES = """
%all-reduce-scatter.1 (i: f32[64]) -> f32[16] {
  %i = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = f32[16]{0} dynamic-slice(%r, %at), dynamic_slice_sizes={16}
}
%begin (i: bf16[32]) -> bf16[64] {
  %j = bf16[32]{0} parameter(0)
  ROOT %g = bf16[64]{0} all-gather(%j), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_end":"-1","flag_start":"-1"}}
}
%finish (i: bf16[32]) -> bf16[64] {
  %k = bf16[32]{0} parameter(0)
  ROOT %h = bf16[64]{0} all-gather(%k), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_end":"8","flag_start":"2"}}
}
ENTRY %main (x: f32[64], y: bf16[32]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %y = bf16[32]{0:S(1)} parameter(1)
  %scattered = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %begun = bf16[64]{0} fusion(%y), kind=kCustom, calls=%begin
  %finished = bf16[64]{0} fusion(%y), kind=kCustom, calls=%finish
  %sum = f32[64]{0} all-reduce(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %all = f32[64]{0} all-reduce(%x), channel_id=4, replica_groups={}, to_apply=%add
  %turned = f32[64]{0} all-to-all(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  %sent = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %got = f32[64]{0} collective-permute-done(%sent)
  ROOT %alone = f32[64]{0} all-reduce(%x), channel_id=6, replica_groups=[8,1]<=[8], to_apply=%add
}
""".replace("\\\n", "")


def test_collectives():
    """By hand, n members around a ring: n - 1 parts of what comes out are sent; twice for a sum that all keep."""
    found = hlo.collectives(hlo.parse(COLLECTIVES), "main", 8)
    assert found == {
        "all-gather": 64,  # two members, once although two fusions name it
        "reduce-scatter": 256 * 3 // 4,  # a sum of which each keeps a part
        "all-reduce": 2 * 256 * 3 // 4 + 2 * 256 * 7 // 8,  # over four; over all eight; over itself
        "all-to-all": 256 * 3 // 4,
        "collective-permute": 256,
    }


@pytest.mark.parametrize(
    "name, products", [("splash_mha_fwd_segmented.1", 2), ("splash_mha_dkv.2", 4), ("splash_mha_dq", 3)]
)
def test_attention_kernels(name, products):
    tables, q, k = [[1, 4, 4]] * 2, [2, 8, 512, 128], [2, 4, 512, 128]
    square = products * 2 * (2 * 8) * 512 * 512 * 128
    assert jobs.attention_flops(name, [*tables, q, k, k], causal=1024) == square
    # of 4 x 4 blocks those on and below the diagonal
    assert jobs.attention_flops(name, [*tables, q, k, k], causal=512) == square * 10 // 16
    assert jobs.attention_flops("another_kernel", [*tables, q, k, k], causal=512) == 0
