"""The PTX machine reports faults that the tests plant into a correct kernel.

The kernel is the forward pass of attention whose PTX is stored in tests/ptx/kept.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, relative_error
from ptx import HAS_WHEELS, capture, kept, machine
from ptx.faults import Deadlock, DivergentBarrier, Fault, MissingProxyFence, Race
from ptx.program import Program

from pallas_kernels import mosaic_shims, stick_breaking_attention

CASE = kept.attention()


class Launch(NamedTuple):
    """The launch of the correct kernel."""

    program: Program
    before: list[np.ndarray]  # the arrays of the kernel, inputs and outputs
    after: list[np.ndarray]
    error: float  # relative error of the op's output


@functools.cache
def right() -> Launch:
    """Run the correct kernel once, from JAX."""
    launches = []

    def launch(program, arrays):
        before = [x.copy() for x in arrays]
        machine.launch(program, arrays)
        launches.append((program, before, arrays))

    out = capture.run(CASE.function, *CASE.arrays, launch=launch, program_of=kept.program_of)
    arrays = (x.astype(jnp.float32) for x in CASE.arrays)
    wanted = stick_breaking_attention(*arrays, implementation="reference")[0]
    (found,) = launches
    return Launch(*found, relative_error(out, wanted))


def error(change) -> float:
    """Run the kernel after a change; return the relative error of its first output, against the correct kernel.

    `change` is a function from a Program to a changed Program.
    """
    program, before, after, _ = right()
    found = [x.copy() for x in before]
    machine.launch(change(program), found)
    first = next(i for i, x in enumerate(before) if x.tobytes() != after[i].tobytes())
    return relative_error(found[first], after[first])


def replaced(pattern: str, new: str, first: int = 0, count: int | None = 1):
    """Return a change of the PTX that replaces matches of the regular expression `pattern` by `new`.

    The change replaces `count` matches, beginning with match number `first`, counted from 0. If `count` is None, it
    replaces all matches from number `first` on.
    """

    def change(program):
        matches = list(re.finditer(pattern, program.ptx))[first:]
        assert len(matches) >= (count or 1), pattern
        text = program.ptx
        for match in reversed(matches[:count]):
            text = text[: match.start()] + match.expand(new) + text[match.end() :]
        return program._replace(ptx=text)

    return change


def changed_map(place: int, **changes):
    """Return a change of tensor map number `place`.

    `changes`: for each field to change, a function of the old tensor map that returns the new value of the field.
    """

    def change(program):
        *rest, maps = program.parameters
        maps = list(maps)
        maps[place] = maps[place]._replace(**{name: new(maps[place]) for name, new in changes.items()})
        return program._replace(parameters=(*rest, tuple(maps)))

    return change


def arrivals(place: int, more: int):
    """Return a change of the PTX that adds `more` to the number of arrivals that mbarrier number `place` expects."""

    def change(program):
        inits = re.findall(r"(mbarrier\.init\S* \[%r\d+\], )(%r\d+);", program.ptx)
        before = "".join(inits[place])
        count = int(re.search(rf"mov\.b32 \t{inits[place][1]}, (\d+);", program.ptx)[1])
        at = [m.start() for m in re.finditer(re.escape(before), program.ptx)][0]
        text = program.ptx[:at] + program.ptx[at:].replace(before, f"{inits[place][0]}{count + more}", 1)
        return program._replace(ptx=text)

    return change


def skip_the_wait_before(pattern: str):
    """Return a change that removes the last mbarrier wait before the instruction that matches `pattern`.

    The instruction then reads shared memory before the copies into it are complete.
    """

    def change(program):
        end = re.search(pattern, program.ptx).start()
        start = program.ptx.rindex("mbarrier.try_wait", 0, end)
        text = program.ptx[start:].replace(
            program.ptx[start : program.ptx.index(";", start)], "setp.eq.b32 P1, 0, 0", 1
        )
        return program._replace(ptx=program.ptx[:start] + text)

    return change


def test_the_kernel_is_right():
    assert right().error <= FORWARD["bfloat16"]
    assert error(lambda program: program) == 0


BARRIER = r"bar\.sync (%r\d+), 128;"
WRONG_NUMBERS = {
    "two registers of a fragment exchanged": replaced(r"(stmatrix\S* \[.*?\], \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    "a register of an accumulator": lambda program: program._replace(ptx=_another_sum(program.ptx)),
    "the swizzle of a copy": changed_map(1, swizzle=lambda old: 2 * old.swizzle),
    "the stride of a copy": changed_map(1, strides=lambda old: (old.strides[0], old.strides[1] // 2, old.strides[2])),
    "another array": changed_map(0, array=lambda old: 2),
}
FOUND = {
    "the partner of another lane": (
        replaced(r"(shfl\.sync\.bfly\.b32.*), 1, 31", r"\1, 2, 31", count=None), Race, "two values to one byte"
    ),
    "a box of half the width": (changed_map(0, box=lambda old: (old.box[0] // 2, *old.box[1:])), Deadlock, r"bytes to"),
    "a box of twice the width": (changed_map(0, box=lambda old: (2 * old.box[0], *old.box[1:])), Fault, "swizzle of"),
    "a tensor map too large": (
        changed_map(1, sizes=lambda old: (*old.sizes[:2], old.sizes[2] + 64)), Fault, "array 2, which has"
    ),
    "an arrival too many is expected": (arrivals(2, 128), Deadlock, r"mbarrier \w+\S* in phase 0: 128 of"),
    "an arrival too few is expected": (arrivals(2, -192), Fault, "more than 64 arrivals"),
    "no arrival when a tile has been read": (
        replaced(r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 _, \[%r\d+\], 1;", "", count=None),
        Deadlock,
        "mbarrier",
    ),
    "the other phase": (
        replaced(r"(mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\d+\]), %r\d+", r"\1, 1"),
        Deadlock,
        "for the end of a phase of parity 1",
    ),
    "no wait for a copy": (skip_the_wait_before("wgmma"), Fault, "read before it was written: wgmma"),
    "no proxy fence": (replaced(r"fence\.proxy\.async\.shared::cta;", ""), MissingProxyFence, "fence.proxy.async"),
    "no barrier": (replaced(BARRIER, "", count=None), Race, "warp 1 has written it"),
    "a barrier for half a warp": (
        replaced(BARRIER, r"setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync \1, 128;", first=3), DivergentBarrier, "some lanes"
    ),
    "a barrier for one warp": (
        replaced(BARRIER, r"setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync \1, 128;", first=3), Deadlock, "wait for barrier 1"
    ),
    "two buffers in one place": (
        lambda program: program._replace(ptx=_keys_and_values_in_one_place(program.ptx)), Fault, "shared memory at byte"
    ),
    "no wait for a product": (
        replaced(r"wgmma\.wait_group\.sync\.aligned 0;", ""), Fault, "belongs to a wgmma that nothing has waited for"
    ),
    "no fence of a product's registers": (replaced(r"wgmma\.fence\.sync\.aligned;", ""), Fault, "fence is missing"),
    "no wait for a copy out of shared memory": (
        replaced(r"cp\.async\.bulk\.wait_group(?:\.read)? \t0;", "", count=None), Fault, "ends while its bulk copies"
    ),
}  # fmt: skip


def _keys_and_values_in_one_place(ptx: str) -> str:
    copy = r"cp\.async\.bulk\.tensor\.3d\.shared::cta\S* \[(%r\d+)\]"
    *_, keys, values = re.finditer(copy, ptx)
    return ptx[: values.start(1)] + keys[1] + ptx[values.end(1) :]


def _another_sum(ptx: str) -> str:
    """Change one mul.f32 of the PTX: it now reads result register 1 of the first wgmma, instead of register 0."""
    first, second = re.search(r"wgmma\.mma_async\S* \{(%r\d+),(%r\d+)", ptx).groups()
    changed, count = re.subn(rf"(mul\.f32 \t%r\d+, %r\d+), {first};", rf"\1, {second};", ptx, count=1)
    assert count
    return changed


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_a_wrong_map_gives_wrong_numbers(name):
    assert not error(WRONG_NUMBERS[name]) <= 10 * FORWARD["bfloat16"]


@pytest.mark.parametrize("name", FOUND)
def test_a_fault_is_reported(name):
    change, kind, message = FOUND[name]
    with pytest.raises(kind, match=message):
        error(change)


def test_a_deadlock_names_the_barrier_and_who_waits():
    change, *_ = FOUND["an arrival too many is expected"]
    with pytest.raises(Deadlock, match=r"warps 0 to 3 of block \(0, 0, 0\) waits? for mbarrier \w+"):
        error(change)


@pytest.mark.skipif(not HAS_WHEELS, reason="needs the CUDA wheels and no GPU: make test-ptx")
def test_a_reduction_of_two_warpgroups_through_one_scratch_is_a_race(monkeypatch):
    """The machine reports a race if two warpgroups reduce through the same scratch memory.

    The kernel calls `mosaic_shims.any_at_most`, which avoids this race. The test replaces `any_at_most` by a function
    that uses jnp.min, which has the race.
    """
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, 330, 1, 32)), jnp.bfloat16) for _ in range(3)]

    def attend(*arrays):
        return stick_breaking_attention(*arrays, skip_below=-24.0, implementation="mosaic")[0]

    out = capture.run(attend, *arrays)
    wanted = stick_breaking_attention(*(x.astype(jnp.float32) for x in arrays), implementation="reference")[0]
    assert relative_error(out, wanted) <= FORWARD["bfloat16"]
    monkeypatch.setattr(mosaic_shims, "any_at_most", lambda x, limit: jnp.min(x) <= limit)
    jax.clear_caches()
    with pytest.raises(Race, match="shared memory at byte"):
        capture.run(attend, *arrays)
