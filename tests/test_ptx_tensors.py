"""Test the PTX machine's copies of boxes, matrix fragments and matrix products against NumPy."""

import numpy as np
import pytest
from ptx import written
from ptx.faults import DivergentBarrier, Fault
from ptx.program import TensorMap

READY = "setp.eq.u32 %p1, %r60, 0; @%p1 mbarrier.init.shared.b64 [%r63+4096], 1; bar.sync 0;"
MINE = "shl.b32 %r50, %r60, 2; cvt.u64.u32 %d50, %r50;"


@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("row, column", [(2, 0), (-3, -8), (15, 72)])
def test_boxes_at_the_edges_are_swizzled_both_ways(swizzle, row, column):
    """A box inside its array or partly outside of it is copied to shared memory and back correctly, with every swizzle.

    The elements of the box outside of the array are zero in shared memory and are not written back. The test also
    checks the address of each element in shared memory.
    """
    source = np.arange(20 * 80, dtype=np.uint16).reshape(20, 80) + 1
    width = swizzle // 2
    seen, copy = np.zeros(8 * width, np.uint16), np.zeros_like(source)
    maps = [TensorMap(i, 0, 2, (80, 20), (2, 160), (width, 8), swizzle) for i in (0, 2)]
    body = f"""{MINE} {READY} @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r63+4096], {16 * width};
        mov.b32 %r1, {column}; mov.b32 %r2, {row}; add.s64 %d61, %d60, 128;
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r63], [%d60, {{%r1, %r2}}], [%r63+4096];
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r63+4096], 0; @!%p2 bra WAIT;
        setp.lt.u32 %p3, %r60, {4 * width}; add.u32 %r3, %r63, %r50; add.s64 %d51, %d1, %d50;
        @%p3 ld.shared.b32 %r4, [%r3]; @%p3 st.global.b32 [%d51], %r4;
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d61, {{%r1, %r2}}], [%r63];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""
    written.run(body, source, seen, copy, threads=256, shared=8192, maps=tuple(maps))
    rows, columns = np.arange(8) + row, np.arange(width) + column
    inside = ((rows >= 0) & (rows < 20))[:, None] & ((columns >= 0) & (columns < 80))
    box = np.where(inside, source[rows.clip(0, 19)][:, columns.clip(0, 79)], 0)
    for r in range(8):
        for c in range(width):
            byte = r * swizzle + 2 * c
            chunk = byte // 16 ^ (byte // 128 & {16: 0, 32: 1, 64: 3, 128: 7}[swizzle])
            assert seen[chunk * 8 + c % 8] == box[r, c], (r, c)
    want = np.zeros_like(source)
    want[rows.clip(0, 19)[inside.any(1)][:, None], columns[inside.any(0)]] = box[inside.any(1)][:, inside.any(0)]
    assert (copy == want).all()


FRAGMENTS = f"""{MINE} add.u32 %r1, %r63, %r50; add.s64 %d51, %d0, %d50; ld.global.b32 %r2, [%d51];
st.shared.b32 [%r1], %r2; bar.sync 0; shl.b32 %r3, %r62, 4; add.u32 %r3, %r3, %r63;"""


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_fragments_are_loaded_and_stored(trans):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out, again = np.zeros((4, 32, 2), np.uint16), np.zeros_like(matrices)
    body = f"""{FRAGMENTS} setp.lt.u32 %p1, %r61, 1; @!%p1 bra END;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r3]; add.s64 %d52, %d1, %d50;
        st.global.b32 [%d52], %r4; st.global.b32 [%d52+128], %r5; st.global.b32 [%d52+256], %r6;
        st.global.b32 [%d52+384], %r7;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+1024], {{%r4, %r5, %r6, %r7}};
        END: bar.sync 0; ld.shared.b32 %r8, [%r1+1024]; add.s64 %d53, %d2, %d50; st.global.b32 [%d53], %r8;"""
    written.run(body, matrices, out, again, threads=128)
    for lane in range(32):
        for half in range(2):
            row, column = lane // 4, lane % 4 * 2 + half
            want = matrices[:, column, row] if trans else matrices[:, row, column]
            assert (out[:, lane, half] == want).all()
    assert (again == matrices).all()


def test_a_fragment_needs_the_whole_warp():
    body = f"{FRAGMENTS} setp.lt.u32 %p1, %r62, 8; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r4}}, [%r3];"
    with pytest.raises(DivergentBarrier, match="some lanes"):
        written.run(body, np.zeros(32, np.uint32))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_a_product_of_a_warp(kind):
    """The instruction mma computes A @ B + C for every type, with the fragments in the layout of the chip.

    The numbers are small integers, so the result is exact.
    """
    rng = np.random.default_rng(0)
    depth = 8 if kind == "tf32" else 16
    a, b, c = rng.integers(-8, 8, (16, depth)), rng.integers(-8, 8, (depth, 8)), rng.integers(-8, 8, (16, 8))

    def bits(x):
        single = np.asarray(x, np.float32).view(np.uint32)
        return {"f16": np.asarray(x, np.float16).view(np.uint16), "bf16": single >> 16, "tf32": single | 0x1FFF}[kind]

    given = np.zeros((10, 32), np.uint32)
    wide = 1 if kind == "tf32" else 2  # numbers per register
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for e in range(wide):
            for i in range(4):
                number = bits(a[group + i % 2 * 8, place * wide + e + i // 2 * depth // 2])
                given[i, lane] |= int(number) << 16 * e
            for i in range(2):
                given[4 + i, lane] |= int(bits(b[place * wide + e + i * depth // 2, group])) << 16 * e
        for i in range(4):
            given[6 + i, lane] = np.float32(c[group + i // 2 * 8, place * 2 + i % 2]).view(np.uint32)
    out = np.zeros((4, 32), np.float32)
    loads = " ".join(f"ld.global.b32 %r{10 + i}, [%d51+{128 * i}];" for i in range(6))
    loads += " ".join(f"ld.global.b32 %f{i}, [%d51+{128 * (6 + i)}];" for i in range(4))
    stores = " ".join(f"st.global.b32 [%d52+{128 * i}], %f{4 + i};" for i in range(4))
    body = f"""{MINE} add.s64 %d51, %d0, %d50; add.s64 %d52, %d1, %d50; {loads}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, {{%r10, %r11, %r12, %r13}},
            {{%r14, %r15}}, {{%f0, %f1, %f2, %f3}}; {stores}"""
    written.run(body, given, out)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2
            assert out[i, lane] == (a @ b + c)[row, column]


PRODUCT = """{} wgmma.fence.sync.aligned; mov.b64 %d1, 0; setp.ne.u32 %p1, 0, 0; {}
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, {{%r1, %r2, %r3, %r4}}, %d2, %p1, 1, 1, 0;
{} wgmma.commit_group.sync.aligned; {} wgmma.wait_group.sync.aligned 0; mov.f32 %f9, %f0;"""
SHARED = """shl.b32 %r10, %r60, 4; add.u32 %r10, %r10, %r63; st.shared.v4.b32 [%r10], {%r60, %r60, %r60, %r60};
fence.proxy.async.shared::cta; bar.sync 0; shr.u32 %r11, %r63, 4; cvt.u64.u32 %d2, %r11;
add.s64 %d2, %d2, 0x800080000;"""

MORE = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{}}}, {{{}}}, %d2, %p1, 1, 1, 0;"


@pytest.mark.parametrize(
    "place, text, message",
    [
        (1, "mov.b32 %r3, 0;", "wgmma.fence is missing between a write to %r3"),
        (2, "mov.f32 %f9, %f3;", "%f3 belongs to a wgmma that nothing has waited for"),
        (3, "mov.b32 %r4, 0;", "%r4 belongs to a wgmma"),
        (2, MORE.format("%f4, %f5, %f6, %f7", "%f0, %f1, %f2, %f3"), "%f0 is an operand of one wgmma and the result"),
        (2, MORE.format("%r1, %r2, %r3, %r4", "%r5, %r6, %r7, %r8"), "%r1 is an operand of one wgmma and the result"),
    ],
)
def test_registers_of_a_product_that_runs_are_left_alone(place, text, message):
    parts = [SHARED, "", "", ""]
    # A second product may use the same registers in the same roles.
    more = MORE.format("%f0, %f1, %f2, %f3", "%r1, %r2, %r3, %r4")
    written.run(PRODUCT.format(SHARED, "", more, ""), threads=128)
    parts[place] += text
    with pytest.raises(Fault, match=message):
        written.run(PRODUCT.format(*parts), threads=128)
