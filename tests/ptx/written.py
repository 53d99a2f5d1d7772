"""Handwritten programs for the tests of the PTX machine: `run` makes a kernel from a few lines of PTX and runs it.

The lines, called the body, may use the registers %p0 to %p15, %h0 to %h31 (16 bits), %r0 to %r63, %f0 to %f63 and %d0
to %d63 (64 bits). When the body begins, these registers have values: %d0, %d1, .. the addresses of the arrays; %d60 the
address of the tensor maps, if there are any; %r60 the number of the thread in the block; %r61 the number of its warp in
the block; %r62 the number of its lane in the warp; and %r63 the address of shared memory.
"""

import itertools

import numpy as np

from . import machine
from .program import Program, TensorMap

_KERNEL = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry written({parameters})
{{
.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .f32 %f<64>; .reg .b64 %d<64>;
mov.u32 %r60, %tid.x;
shr.u32 %r61, %r60, 5;
and.b32 %r62, %r60, 31;
mov.b32 %r63, memory;
{addresses}
{body}
ret;
}}
"""
BITS = {"pred": 32, "f32": 32} | {f"{c}{n}": n for c in "bsu" for n in (8, 16, 32, 64)}


def run(body: str, *arrays: np.ndarray, threads=32, grid=1, shared=4096, maps: tuple[TensorMap, ...] = ()) -> None:
    """Run a body of PTX on arrays, which it changes in place.

    Args:
      body: the lines of PTX.
      threads: the number of threads per block.
      grid: the number of blocks.
      shared: the bytes of shared memory.
      maps: the tensor maps of the copies.
    """
    parameters = [f".param .u64 a{i}" for i in range(len(arrays))]
    addresses = [f"ld.param.u64 %d{i}, [a{i}];" for i in range(len(arrays))]
    if maps:
        parameters.append(f".param .align 64 .b8 maps[{128 * len(maps)}]")
        addresses.append("mov.b64 %d60, maps;")
    ptx = _KERNEL.format(parameters=", ".join(parameters), addresses="\n".join(addresses), body=body)
    program = Program(
        name="written",
        ptx=ptx,
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared=shared,
        parameters=(*range(len(arrays)), *([maps] if maps else [])),
        barriers=("first", "second", "third", "fourth"),
    )
    machine.launch(program, list(arrays))


def encode(kind: str, value) -> int:
    """Return the bits that represent the number `value` in the type `kind`, such as "s32" or "f32"."""
    if kind == "f32":
        with np.errstate(over="ignore"):
            return int(np.float32(value).view(np.uint32))
    return int(value) & (1 << BITS[kind]) - 1


def decode(kind: str, bits: int):
    """Return the Python number that `bits` represent in the type `kind`."""
    if kind == "f32":
        return float(np.uint32(bits).view(np.float32))
    bits &= (1 << BITS[kind]) - 1
    is_negative = kind[0] == "s" and bits >> BITS[kind] - 1
    return bits - (1 << BITS[kind]) if is_negative else bits


_REGISTERS = {16: "%h", 8: "%h", 32: "%r", 64: "%d"}
MASKED_OFF = 0x5A5A5A5A5A5A5A5A  # the result in lanes that an instruction does not change


def apply(text: str, out: str, kinds: list[str], cases: list[tuple], *, odd_lanes_only=False) -> list:
    """Run instructions on many cases, one case per lane; return the result of each case.

    Args:
      text: the instructions, with {d} for the register of the result, and {0}, {1}, .. for the operands' registers.
      out, kinds: the type of the result, and the types of the operands.
      cases: a tuple of operands for each case.
      odd_lanes_only: execute the instructions only in the odd lanes. The even lanes keep the value that the register of
        the result has at the start: the lowest bits of MASKED_OFF, or 0 for the type "pred".
    """
    threads = -(-len(cases) // 32) * 32
    padded = list(itertools.islice(itertools.cycle(cases), threads))
    given = np.array([[encode(k, v) for k, v in zip(kinds, case, strict=True)] for case in padded], np.uint64)
    result = np.zeros(threads, np.uint64)
    registers, body = [], ["mul.wide.u32 %d10, %r60, 8;", f"mul.wide.u32 %d11, %r60, {8 * len(kinds)};"]
    body += ["add.s64 %d10, %d10, %d1;", "add.s64 %d11, %d11, %d0;"]
    for i, kind in enumerate(kinds):
        bits = BITS[kind]
        name = f"%f{20 + i}" if kind == "f32" else f"{_REGISTERS[bits]}{20 + i}"
        body.append(f"ld.global.b{bits} {name}, [%d11+{8 * i}];")
        if kind == "pred":
            body.append(f"setp.ne.b32 %p{i}, {name}, 0;")
            name = f"%p{i}"
        registers.append(name)
    target = {"f32": "%f19", "pred": "%p9"}.get(out) or f"{_REGISTERS[BITS[out]]}19"
    body.append("mov.b64 {%r18, %r17}, " + f"{MASKED_OFF};")
    if out == "pred":
        body.append("setp.ne.b32 %p9, 0, 0;")
    else:
        move = {"%f": "mov.b32 %f19, %r18;", "%h": "cvt.u16.u32 %h19, %r18;", "%r": "mov.b32 %r19, %r18;"}
        body.append(move.get(target[:2], f"mov.b64 %d19, {MASKED_OFF};"))
    body += ["and.b32 %r16, %r60, 1;", "setp.ne.b32 %p10, %r16, 0;"]
    lines = text.format(*registers, d=target).split(";")
    body += [("@%p10 " if odd_lanes_only else "") + line.strip() + ";" for line in lines if line.strip()]
    if out == "pred":
        body.append("selp.b32 %r19, 1, 0, %p9;")
        target = "%r19"
    body.append(f"st.global.b{max(BITS[out], 16)} [%d10], {target};")
    run("\n".join(body), given, result, threads=threads)
    return [decode(out, int(x)) for x in result[: len(cases)]]
