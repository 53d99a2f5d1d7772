"""The PTX machine runs small handwritten programs correctly, and reports every kind of fault in them."""

import numpy as np
import pytest
from ptx import written
from ptx.decode import UnknownInstruction
from ptx.faults import Deadlock, DivergentBarrier, Fault, MissingProxyFence, Race

MINE = "shl.b32 %r50, %r60, 2; cvt.u64.u32 %d50, %r50;"  # 4 bytes for each thread


def words(n: int) -> np.ndarray:
    return np.zeros(n, np.uint32)


def each_thread(body: str, threads: int = 32, **options) -> np.ndarray:
    """Run a body of PTX and return the final value of register %r59 in every thread.

    `options` are arguments of `written.run`.
    """
    out = words(threads)
    written.run(f"{MINE} {body} add.s64 %d51, %d0, %d50; st.global.b32 [%d51], %r59;", out, threads=threads, **options)
    return out


def test_lanes_leave_a_loop_one_by_one_and_meet_again():
    """Lanes that leave a loop after different numbers of rounds execute the instruction after the loop together.

    In the loop, each lane counts the Collatz steps of its number. After the loop, neighbouring lanes exchange their
    counts by a shuffle.
    """
    out = each_thread(
        """mov.u32 %r59, 0; add.u32 %r1, %r60, 1;
        NEXT: setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;
        add.u32 %r59, %r59, 1; and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0; @%p2 bra EVEN;
        mad.lo.s32 %r1, %r1, 3, 1; bra NEXT;
        EVEN: shr.u32 %r1, %r1, 1; bra NEXT;
        DONE: shfl.sync.bfly.b32 %r3, %r59, 1, 31, 0xffffffff; mad.lo.s32 %r59, %r59, 1000, %r3;""",
        64,
    )

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [1000 * steps(i + 1) + steps((i ^ 1) + 1) for i in range(64)]


@pytest.mark.parametrize("how", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("clamp", [0, 0x1F, 0x0F, 0x181F, 0x1C03, 0x1800])
def test_shuffles_stay_in_their_segment(how, by, clamp):
    out = each_thread(
        f"add.u32 %r1, %r60, 100; shfl.sync.{how}.b32 %r2|%p1, %r1, {by}, {clamp}, -1; selp.u32 %r3, 1000, 0, %p1;"
        "add.u32 %r59, %r2, %r3;",
        64,
    )
    for thread, got in enumerate(out):
        lane, segment = thread % 32, clamp >> 8
        last = lane & segment | clamp & 31 & ~segment
        source = {"bfly": lane ^ by, "idx": lane & segment | by & ~segment, "up": lane - by, "down": lane + by}[how]
        is_inside = source >= last if how == "up" else source <= last
        assert got == 100 + thread - lane + (source if is_inside else lane) + 1000 * is_inside


def test_votes_and_the_elected_lane_are_of_the_lanes_that_take_part():
    """Votes and elections count only the lanes that take part.

    Lanes 16 to 31 of the warp vote. Lanes 0 to 15 have jumped to another instruction, so their predicates must not
    count.
    """
    vote = """setp.ne.u32 %p1, %r62, 20; mov.u32 %r59, 0; setp.lt.u32 %p2, %r62, 16; @%p2 bra END;
        {} END:"""
    ballot = each_thread(vote.format("vote.sync.ballot.b32 %r59, %p1, 0xffff0000;"))
    assert set(ballot[16:]) == {0xFFFF0000 & ~(1 << 20)} and not ballot[:16].any()
    for how, predicate, want in (("all", "%p1", 0), ("any", "!%p1", 1), ("any", "%p2", 0), ("all", "!%p2", 1)):
        out = each_thread(vote.format(f"vote.sync.{how}.pred %p3, {predicate}, 0xffff0000; selp.u32 %r59, 1, 0, %p3;"))
        assert set(out[16:]) == {want}, (how, predicate)
    elected = each_thread(vote.format("elect.sync %r1|%p3, 0xffff0000; selp.u32 %r2, 1, 0, %p3; mad.lo.u32 %r59, "
                                      "%r1, 10, %r2;"))  # fmt: skip
    assert elected.tolist() == [0] * 16 + [161] + [160] * 15
    with pytest.raises(Fault, match="names lanes that do not execute"):
        each_thread(vote.format("vote.sync.ballot.b32 %r59, %p1, -1;"))
    with pytest.raises(Fault, match="does not name"):
        each_thread("elect.sync _|%p3, 0xffff; mov.u32 %r59, 0;")


VOTES = [("or", 1, 0, 1), ("or", 0, 0, 0), ("and", 0, 1, 0), ("and", 1, 1, 1)]


@pytest.mark.parametrize("how, one, others, want", VOTES)
def test_a_barrier_counts_the_votes_of_all_its_warps(how, one, others, want):
    """bar.red combines the predicates of all 256 threads, and a second bar.red forgets the votes of the first.

    In the second bar.red, thread 200 votes `one`, and all other threads vote `others`. In the first bar.red, every
    thread votes the opposite.
    """
    out = each_thread(
        f"""setp.eq.u32 %p1, %r60, 200; selp.u32 %r1, {one}, {others}, %p1; setp.ne.u32 %p2, %r1, 0;
        bar.red.{how}.pred %p3, 2, 256, !%p2; bar.red.{how}.pred %p3, 2, 256, %p2; selp.u32 %r59, 1, 0, %p3;""",
        256,
    )
    assert set(out) == {want}


# Warps that share memory.
EXCHANGE = """setp.eq.u32 %p1, %r61, 0; shl.b32 %r1, %r62, 2; add.u32 %r1, %r1, %r63;
@%p1 st.shared.b32 [%r1], %r62; {} mov.u32 %r59, 7; @!%p1 ld.shared.b32 %r59, [%r1];"""


def test_two_warps_need_a_barrier_to_exchange_numbers():
    assert each_thread(EXCHANGE.format("bar.sync 0;"), 64).tolist() == [7] * 32 + list(range(32))
    with pytest.raises(Race, match="warp 0 has written it"):
        each_thread(EXCHANGE.format(""), 64)
    with pytest.raises(Race, match="warp 0 has written it"):
        each_thread(EXCHANGE.format("bar.warp.sync -1;"), 64)
    with pytest.raises(Race, match="has read it"):  # the second round overwrites what the other warp may still read
        each_thread(EXCHANGE.format("bar.sync 0;") + "@%p1 st.shared.b32 [%r1], %r62;", 64)


def reduction(stride: int) -> str:
    """Return a body of PTX in which every thread computes the sum of the warp numbers of its warpgroup.

    Each of the four warps writes its number into shared memory, and every thread then reads the four numbers, which
    are 16 bytes. The 16 bytes of the next warpgroup begin `stride` bytes later. With a `stride` below 16, the bytes of
    two warpgroups overlap.
    """
    return f"""shr.u32 %r1, %r61, 2; mad.lo.u32 %r2, %r1, {stride}, %r63; and.b32 %r3, %r61, 3; shl.b32 %r3, %r3, 2;
        add.u32 %r4, %r2, %r3; add.u32 %r5, %r1, 1; setp.eq.u32 %p1, %r62, 0;
        @%p1 st.shared.b32 [%r4], %r61; bar.sync %r5, 128; ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r2];
        add.u32 %r59, %r10, %r11; add.u32 %r59, %r59, %r12; add.u32 %r59, %r59, %r13;"""


def test_two_warpgroups_may_not_reduce_through_the_same_bytes():
    assert each_thread(reduction(16), 256).tolist() == [6] * 128 + [22] * 128
    with pytest.raises(Race):
        each_thread(reduction(0), 256)


def test_warps_of_a_unit_reach_a_barrier_at_different_times():
    """Warps of one unit can be at different barriers: some already at bar.sync, others still at an mbarrier.

    A unit is four warps that the PTX machine executes together, here warps 4 to 7. Warps 4 and 5 wait for arrivals of
    warps 0 to 3, while warps 6 and 7 are already at bar.sync.
    """
    body = """setp.eq.u32 %p0, %r60, 0; @%p0 mbarrier.init.shared.b64 [%r63+1024], 128; bar.sync 0;
        shr.u32 %r1, %r61, 1; setp.ne.u32 %p1, %r1, 2; @%p1 bra OTHERS;
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r63+1024], 0; @!%p2 bra WAIT;
        bra MEET;
        OTHERS: setp.gt.u32 %p3, %r61, 3; @%p3 bra MEET;
        mbarrier.arrive.shared.b64 _, [%r63+1024];
        MEET: bar.sync 1, 256; bar.sync 1, 256; mov.u32 %r59, 1;"""
    assert each_thread(body, 256).all()


PER_WARP = """setp.eq.u32 %p0, %r60, 0; @!%p0 bra READY;
mbarrier.init.shared.b64 [%r63+1024], 32; mbarrier.init.shared.b64 [%r63+1032], 32;
READY: bar.sync 0; and.b32 %r1, %r61, 1; shl.b32 %r2, %r1, 3; add.u32 %r2, %r2, %r63;
setp.lt.u32 %p1, %r61, 2; @%p1 bra WAIT;
add.u32 %r3, %r2, 0; setp.eq.u32 %p3, %r62, 0; @%p3 st.shared.b32 [%r3], %r61;
mbarrier.arrive.shared.b64 _, [%r2+1024]; bra END;
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2+1024], 0; @!%p2 bra WAIT;
{} END: mov.u32 %r59, 0;"""


def test_warps_that_wait_at_different_mbarriers_learn_different_things():
    each_thread(PER_WARP.format("ld.shared.b32 %r4, [%r2];"), 128)
    with pytest.raises(Race):
        each_thread(PER_WARP.format("xor.b32 %r2, %r2, 8; ld.shared.b32 %r4, [%r2];"), 128)


def test_warps_of_a_unit_pass_an_mbarrier_one_after_the_other():
    """Two warps that wait at the same instruction for different mbarriers can pass it at different times.

    Warp 0 waits for warp 2, and warp 1 waits for warp 0.
    """
    body = """setp.eq.u32 %p0, %r60, 0; @!%p0 bra READY;
        mbarrier.init.shared.b64 [%r63+1024], 32; mbarrier.init.shared.b64 [%r63+1032], 32;
        READY: bar.sync 0; shl.b32 %r2, %r61, 3; add.u32 %r2, %r2, %r63; setp.eq.u32 %p1, %r61, 2; @%p1 bra SIGNAL;
        WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r2+1024], 0; @!%p2 bra WAIT;
        setp.eq.u32 %p3, %r61, 0; @%p3 mbarrier.arrive.shared.b64 _, [%r63+1032]; bra END;
        SIGNAL: mbarrier.arrive.shared.b64 _, [%r63+1024];
        END: mov.u32 %r59, 1;"""
    assert each_thread(body, 96).all()


# A ring of two buffers of 128 bytes: warp 0 fills it by bulk copies, warps 1 and 2 read it.
WAIT_UNUSED = "UNUSED: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3+1040], %r6; @!%p3 bra UNUSED;"
WAIT_FULL = "FULL: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3+1024], %r5; @!%p3 bra FULL;"
RING = f"""setp.ne.u32 %p0, %r60, 0; @%p0 bra READY;
mbarrier.init.shared.b64 [%r63+1024], 1; mbarrier.init.shared.b64 [%r63+1032], 1;
mbarrier.init.shared.b64 [%r63+1040], 64; mbarrier.init.shared.b64 [%r63+1048], 64;
fence.mbarrier_init.release.cluster;
READY: bar.sync 0; mov.u32 %r1, 0; mov.u32 %r59, 0; setp.ne.u32 %p1, %r61, 0; @%p1 bra READ;
setp.ne.u32 %p2, %r62, 0; @%p2 bra DONE;
FILL: and.b32 %r2, %r1, 1; shl.b32 %r3, %r2, 3; add.u32 %r3, %r3, %r63; shl.b32 %r4, %r2, 7; add.u32 %r4, %r4, %r63;
shr.u32 %r5, %r1, 1; and.b32 %r5, %r5, 1; xor.b32 %r6, %r5, 1;
{WAIT_UNUSED}
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3+1024], 128;
mad.wide.u32 %d10, %r1, 128, %d1;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%d10], 128, [%r3+1024];
add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 6; @%p4 bra FILL;
bra DONE;
READ: and.b32 %r2, %r1, 1; shl.b32 %r3, %r2, 3; add.u32 %r3, %r3, %r63; shl.b32 %r4, %r2, 7; add.u32 %r4, %r4, %r63;
shr.u32 %r5, %r1, 1; and.b32 %r5, %r5, 1;
{WAIT_FULL}
shl.b32 %r7, %r62, 2; add.u32 %r7, %r7, %r4; ld.shared.b32 %r8, [%r7];
mad.lo.u32 %r59, %r59, 3, %r8;
mbarrier.arrive.shared::cta.b64 _, [%r3+1040];
add.u32 %r1, %r1, 1; setp.lt.u32 %p4, %r1, 6; @%p4 bra READ;
DONE:"""


def ring(old: str = "READY", new: str = "READY") -> np.ndarray:
    out, data = words(96), np.arange(192, dtype=np.uint32)
    assert old in RING
    body = RING.replace(old, new) + "add.s64 %d51, %d0, %d50; st.global.b32 [%d51], %r59;"
    written.run(MINE + body, out, data, threads=96)
    return out


def test_a_ring_of_two_buffers():
    want = np.zeros(32, np.uint32)
    for chunk in np.arange(192, dtype=np.uint32).reshape(6, 32):
        want = want * 3 + chunk
    assert (ring().reshape(3, 32) == [np.zeros(32), want, want]).all()


@pytest.mark.parametrize(
    "old, new, fault, message",
    [
        ("mbarrier.arrive.shared::cta.b64 _, [%r3+1040];", "", Deadlock, "mbarrier third in phase 0: 64 of 64"),
        (WAIT_UNUSED, "", Race, "copies"),
        (WAIT_FULL, "", Race, "copies"),
        ("[%r63+1040], 64", "[%r63+1040], 32", Fault, "more than 32 arrivals"),
        ("_, [%r3+1024], 128;", "_, [%r3+1024], 144;", Deadlock, "mbarrier first in phase 0: 0 of 1 arrivals and 16"),
        ("xor.b32 %r6, %r5, 1;", "mov.b32 %r6, %r5;", Deadlock, "mbarrier third"),
    ],
)
def test_a_ring_that_is_wrong(old, new, fault, message):
    with pytest.raises(fault, match=message):
        ring(old, new)


FIRST = "setp.eq.u32 %p1, %r60, 0;"
STORE_BULK = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r63], 128;"
GROUP = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;"
FENCE = "fence.proxy.async.shared::cta;"
FILL = "shl.b32 %r1, %r60, 2; add.u32 %r2, %r1, %r63; st.shared.b32 [%r2], %r60;"
LOAD_BULK = """@%p1 mbarrier.init.shared.b64 [%r63+1024], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r63+1024], 128;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r63], [%d0], 128, [%r63+1024];"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r63+1024], 0; @!%p2 bra WAIT;"


def test_a_bulk_copy_of_what_threads_wrote():
    out = words(64)
    written.run(f"{FIRST} {FILL} {FENCE} bar.sync 0; {STORE_BULK} {GROUP}", out, threads=64)
    assert out.tolist() == [*range(32), *[0] * 32]


ASYNC = "cp.async.ca.shared.global [%r2], [%d50], 4;"
FAULTS = {
    "no proxy fence": (f"{FIRST} {FILL} bar.sync 0; {STORE_BULK} {GROUP}", MissingProxyFence, "warp 0 wrote it"),
    "a proxy fence of global memory": (
        f"{FIRST} {FILL} fence.proxy.async.global; bar.sync 0; {STORE_BULK} {GROUP}", MissingProxyFence, "warp 0 wrote"
    ),
    "a proxy fence before the write": (
        f"{FIRST} {FILL} {FENCE} {FILL} bar.sync 0; {STORE_BULK} {GROUP}", MissingProxyFence, "warp 0 wrote it"
    ),
    "a copy of bytes that nobody wrote": (f"{FIRST} {STORE_BULK} {GROUP}", Fault, "read before it was written"),
    "a write while a copy reads": (
        f"{FIRST} {FILL} {FENCE} bar.sync 0; {STORE_BULK} @%p1 st.shared.b32 [%r63], 0;", Race, "bulk copies out of"
    ),
    "a block that ends while copies read": (
        f"{FIRST} {FILL} {FENCE} bar.sync 0; {STORE_BULK}", Fault, "ends while its bulk copies read"
    ),
    "a block that ends while copies write": (f"{FIRST} {LOAD_BULK}", Fault, "but no warp has waited until the copies"),
    "a read of a copy without a wait": (f"{FIRST} {LOAD_BULK} ld.shared.b32 %r3, [%r63];", Race, "mbarrier 0 has"),
    "a write over an mbarrier": (f"{FIRST} {LOAD_BULK} {WAIT} st.shared.b32 [%r63+1028], 0;", Fault, "over an"),
    "no mbarrier there": ("mbarrier.arrive.shared.b64 _, [%r63+1024];", Fault, "no mbarrier at byte 1024"),
    "an mbarrier that another warp initialises": (
        f"{FIRST} @%p1 mbarrier.init.shared.b64 [%r63+1024], 64; mbarrier.arrive.shared.b64 _, [%r63+1024];",
        Fault, "initialisation",
    ),
    "an mbarrier that lacks an arrival": (
        f"{FIRST} @%p1 mbarrier.init.shared.b64 [%r63+1024], 2; bar.sync 0; "
        f"@%p1 mbarrier.arrive.shared.b64 _, [%r63+1024]; {WAIT}",
        Deadlock, "warps 0 to 1 .* wait for mbarrier first in phase 0: 1 of 2 arrivals",
    ),
    "a barrier that a warp does not reach": (
        "setp.eq.u32 %p1, %r61, 1; @%p1 bra END; bar.sync 0; END:", Deadlock, "warps 0 of .* wait for barrier 0"
    ),
    "a barrier for half of a warp": (
        "setp.lt.u32 %p1, %r62, 16; @%p1 bra END; bar.sync 0; END:", DivergentBarrier, "only some lanes"
    ),
    "a barrier of two sizes": (
        "setp.eq.u32 %p1, %r61, 0; @%p1 bar.sync 1, 96; bar.sync 1, 64;", DivergentBarrier, "names 96 threads, "
    ),
    "beyond an array": ("add.s64 %d1, %d0, 256; ld.global.b32 %r1, [%d1];", Fault, "byte 259 of array 0"),
    "before an array": ("st.global.b32 [%d0+-4], %r1;", Fault, "outside of all arrays"),
    "not a multiple of the size": ("ld.global.b32 %r1, [%d0+2];", Fault, "not a multiple of 4"),
    "beyond shared memory": ("st.shared.v4.b32 [%r63+4096], {%r1, %r1, %r1, %r1};", Fault, "byte 4111 of 4096"),
    "before shared memory": ("ld.shared.b32 %r1, [%r63+-8];", Fault, "byte -8 of 4096"),
    "two values for one byte": ("st.shared.b32 [%r63], %r60;", Race, "two values to one byte"),
    "no wait for cp.async": (
        f"{MINE} {FILL} add.s64 %d50, %d0, %d50; {ASYNC} cp.async.commit_group; cp.async.wait_group 1; "
        "ld.shared.b32 %r3, [%r2];",
        Race, "cp.async of warp 0",
    ),
    "cp.async after the wait": (
        f"{MINE} {FILL} add.s64 %d50, %d0, %d50; {ASYNC} cp.async.wait_all; {ASYNC} ld.shared.b32 %r3, [%r2];",
        Race, "cp.async of warp 0",
    ),
    "cp.async without a group": (
        f"{MINE} {FILL} add.s64 %d50, %d0, %d50; {ASYNC} cp.async.wait_group 0; ld.shared.b32 %r3, [%r2];",
        Race, "cp.async of warp 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(name):
    body, fault, message = FAULTS[name]
    with pytest.raises(fault, match=message):
        written.run(body, words(64), threads=64)


@pytest.mark.parametrize(
    "body",
    [
        "st.global.b32 [%d0], %r0;",
        "setp.eq.u32 %p1, %r10, 0; @%p1 st.global.b32 [%d0], %r0; @!%p1 ld.global.b32 %r0, [%d0];",
        "setp.eq.u32 %p1, %r10, 1; @%p1 st.global.b32 [%d0], %r0; @!%p1 ld.global.b32 %r0, [%d0];",
    ],
    ids=["both write", "the first writes", "the second writes"],
)
def test_two_blocks_may_not_touch_a_byte_that_one_writes(body):
    out = words(2)
    written.run("mov.u32 %r10, %ctaid.x; mad.wide.u32 %d2, %r10, 4, %d0; mov.b64 %d0, %d2; mov.u32 %r0, 5;" + body, out,
                grid=2)  # fmt: skip
    with pytest.raises(Race, match="block 1"):
        written.run("mov.u32 %r10, %ctaid.x; mov.u32 %r0, 5;" + body, words(2), grid=2)


UNKNOWN = [
    "frobnicate.b32 %r1", "add.sat.s32 %r1, %r2, %r3", "mbarrier.arrive.noComplete.shared.b64 %d1, [%r1], 1",
    "cvt.rn.satfinite.bf16x2.f32 %r1, %f1, %f2", "ld.acquire.gpu.global.b32 %r1, [%d0]", "bar.arrive 1, 64",
    "min.xorsign.abs.f32 %f1, %f2, %f3",
    "mov.b32 {%h1, %h2, %h3, %h4}, %r1", "mul.hi.s64 %d1, %d2, %d3", "prmt.b32.f4e %r1, %r2, %r3, %r4",
    "vote.sync.uni.pred %p1, %p2, -1", "atom.shared.xor.b128 %r1, [%d0], 1",
    "add.b32 %r1, %r2, %r3", "mov.b32 %r1, %d1", "mov.u32 %r1, %clock", "ld.param.u64 %d1, [nowhere]", "bra NOWHERE",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d60, {%r2, %r3, %r4}], [%r5]",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2}, [%r63]", "st.shared.b32 [%r63], %r0, %r1",
]  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN)
def test_an_unknown_instruction_stops_the_machine_before_anything_runs(text):
    out = words(1)
    with pytest.raises(UnknownInstruction) as error:
        written.run(f"st.global.b32 [%d0], 7; {text};", out)
    assert text.split()[-1] in str(error.value) and not out.any()
