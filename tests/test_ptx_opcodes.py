"""Single instructions of the PTX machine give the results of Python's integers and floats."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from ptx import written
from ptx.written import decode, encode

EDGES = {
    "s16": [-(2**15), -7, -1, 0, 1, 2**15 - 1],
    "u16": [0, 1, 7, 2**15, 2**16 - 1],
    "b16": [0, 1, 0x1234, 2**16 - 1],
    "s32": [-(2**31), -(2**31) + 1, -7, -1, 0, 1, 2, 2**31 - 1],
    "u32": [0, 1, 2, 7, 0xFFFF, 2**31, 2**32 - 2, 2**32 - 1],
    "b32": [0, 1, 0x12345678, 0x80FF7F01, 2**32 - 1],
    "s64": [-(2**63), -(2**63) + 1, -7, -1, 0, 1, 2, 2**31, 2**63 - 1],
    "u64": [0, 1, 7, 2**32 - 1, 2**32, 2**63, 2**64 - 1],
    "b64": [0, 1, 0x123456789ABCDEF0, 2**64 - 1],
    "f32": [0.0, 1.5, -2.25, 3e38, -3e38, math.inf, -math.inf, math.nan, decode("f32", 3), decode("f32", 0x80000003)],
    "pred": [0, 1],
}
COUNTS = [0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1]


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def flushed(x):
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def number(function):
    """Wrap a function of floats, so that it returns NaN where Python would raise an error."""

    def run(*values):
        try:
            return function(*values)
        except (ValueError, ZeroDivisionError):
            return math.nan

    return run


def smaller(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else min(a, b)


def larger(a, b):
    return -smaller(-a, -b)


def clamped(kind, rounding):
    low, high = (-(2**31), 2**31 - 1) if kind == "s32" else (0, 2**32 - 1)

    def run(x):
        if math.isnan(x):
            return 0
        return (low if x < 0 else high) if math.isinf(x) else min(max(rounding(x), low), high)

    return run


def extracted(a, start, length):
    start, length = start & 255, length & 255
    return sum(1 << i for i in range(min(length, 32)) if start + i < 32 and a >> start + i & 1)


def permuted(a, b, choice):
    source, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        pick = choice >> 4 * i & 15
        byte = source[pick & 7]
        result |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * i
    return result


def by_table(table):
    def run(a, b, c):
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    return run


def half(kind, x):
    """Return the bits of x as a 16-bit float of type `kind`; NaN is always 0x7fff, as on the chip."""
    with np.errstate(over="ignore"):
        return 0x7FFF if math.isnan(x) else int(np.array(x, np.float32).astype(kind).view(np.uint16))


def pair(kind, relu=False):
    def run(high, low):
        if relu:
            high, low = (x if math.isnan(x) else max(x, 0.0) + 0.0 for x in (high, low))
        return half(kind, high) << 16 | half(kind, low)

    return run


ROUNDED = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.4, -0.6, 2.0**31, -(2.0**31), 2.0**32, -1.0, 2**24 - 1.0]
SMALL = [decode("f32", 3), decode("f32", 0x80000003)]
# If a float is NaN, a comparison without "u" is false and a comparison with "u" is true.
COMPARED = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip

# (instructions, type of the result, types of the operands, expected function, values of operands if not EDGES)
TABLE = [
    *[(f"{op}.{kind} {{d}}, {{0}}, {{1}}", kind, [kind, kind], function, {})
      for kind in ("s16", "u16", "s32", "u32", "s64", "u64")
      for op, function in {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
                           "min": min, "max": max}.items()],
    *[(f"mul.hi.{kind} {{d}}, {{0}}, {{1}}", kind, [kind, kind], lambda a, b, n=int(kind[1:]): a * b >> n, {})
      for kind in ("s32", "u32", "u64")],
    *[(f"mul.wide.{kind} {{d}}, {{0}}, {{1}}", f"{kind[0]}{2 * int(kind[1:])}", [kind, kind], lambda a, b: a * b, {})
      for kind in ("s16", "u16", "s32", "u32")],
    *[(f"mad.lo.{kind} {{d}}, {{0}}, {{1}}, {{2}}", kind, [kind] * 3, lambda a, b, c: a * b + c, {})
      for kind in ("s32", "u64")],
    ("mad.wide.s32 {d}, {0}, {1}, {2}", "s64", ["s32", "s32", "s64"], lambda a, b, c: a * b + c, {}),
    ("mad.wide.u16 {d}, {0}, {1}, {2}", "u32", ["u16", "u16", "u32"], lambda a, b, c: a * b + c, {}),
    *[(f"{op}.{kind} {{d}}, {{0}}, {{1}}", kind, [kind, kind], function, {1: [x for x in EDGES[kind] if x]})
      for kind in ("s32", "u32", "s64", "u64")
      for op, function in {"div": quotient, "rem": lambda a, b: a - quotient(a, b) * b}.items()],
    *[(f"{op}.{kind} {{d}}, {{0}}, {{1}}", kind, [kind, kind], function, {})
      for kind in ("b16", "b32", "b64", "pred")
      for op, function in {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}.items()],
    *[(f"not.{kind} {{d}}, {{0}}", kind, [kind], lambda a: ~a, {}) for kind in ("b16", "b32", "b64")],
    ("not.pred {d}, {0}", "pred", ["pred"], lambda a: not a, {}),
    *[(f"{op}.{kind} {{d}}, {{0}}", kind, [kind], function, {})
      for kind in ("s16", "s32", "s64") for op, function in {"neg": lambda a: -a, "abs": abs}.items()],
    *[(f"shl.b{n} {{d}}, {{0}}, {{1}}", f"b{n}", [f"b{n}", "u32"], lambda a, b: a << b if b < 64 else 0, {1: COUNTS})
      for n in (16, 32, 64)],
    *[(f"shr.{kind} {{d}}, {{0}}, {{1}}", kind, [kind, "u32"], lambda a, b: a >> min(b, 64), {1: COUNTS})
      for kind in ("b32", "u16", "s16", "u32", "s32", "u64", "s64")],
    ("bfe.u32 {d}, {0}, {1}, {2}", "u32", ["u32"] * 3, extracted,
     {0: [0x12345678, 2**32 - 1], 1: COUNTS, 2: COUNTS}),
    ("prmt.b32 {d}, {0}, {1}, {2}", "b32", ["b32"] * 3, permuted,
     {2: [0x3210, 0x7654, 0x0123, 0x5410, 0xFEDC, 0xBA98, 0x1111]}),
    *[(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table}", "b32", ["b32"] * 3, by_table(table), {})
      for table in (0, 0x80, 0x6A, 0xCA, 0xE8, 0xFF)],
    # Floats.
    *[(f"{op}.f32 {{d}}, {{0}}, {{1}}", "f32", ["f32", "f32"], function, {})
      for op, function in {"add.rn": number(lambda a, b: a + b), "sub": number(lambda a, b: a - b),
                           "mul": lambda a, b: a * b, "min": smaller, "max": larger}.items()],
    *[(f"{op}.NaN.f32 {{d}}, {{0}}, {{1}}", "f32", ["f32", "f32"],
       lambda a, b, f=function: math.nan if math.isnan(a) or math.isnan(b) else f(a, b), {})
      for op, function in {"min": min, "max": max}.items()],
    ("add.ftz.f32 {d}, {0}, {1}", "f32", ["f32", "f32"], lambda a, b: flushed(flushed(a) + flushed(b)), {}),
    ("mul.ftz.f32 {d}, {0}, {1}", "f32", ["f32", "f32"], lambda a, b: flushed(flushed(a) * flushed(b)),
     {1: [1e-30, -1.0, 2.0**-126]}),
    ("neg.f32 {d}, {0}", "f32", ["f32"], lambda a: -a, {}),
    ("abs.f32 {d}, {0}", "f32", ["f32"], abs, {}),
    ("fma.rn.f32 {d}, {0}, {1}, {2}", "f32", ["f32"] * 3, lambda a, b, c: a * b + c,
     {0: [1.0 + 2.0**-23, 3.0], 1: [1.0 - 2.0**-23, -5.0], 2: [-1.0, 2.0**-60, 7.0]}),
    ("rcp.rn.f32 {d}, {0}", "f32", ["f32"], lambda a: 1 / a, {0: [3.0, -0.1, math.inf, 2.0**-120]}),
    ("sqrt.rn.f32 {d}, {0}", "f32", ["f32"], number(math.sqrt), {0: [2.0, 4.0, -1.0, math.inf]}),
    ("ex2.approx.ftz.f32 {d}, {0}", "f32", ["f32"], lambda a: flushed(2.0**a), {0: [-1.0, 3.0, -130.0, -math.inf]}),
    ("lg2.approx.f32 {d}, {0}", "f32", ["f32"], number(math.log2), {0: [8.0, 0.25, -1.0]}),
    # Comparisons and choices.
    *[(f"setp.{op}.f32 {{d}}, {{0}}, {{1}}", "pred", ["f32", "f32"],
       lambda a, b, f=function: f(a, b) and not (math.isnan(a) or math.isnan(b)), {})
      for op, function in COMPARED.items()],
    *[(f"setp.{op}u.f32 {{d}}, {{0}}, {{1}}", "pred", ["f32", "f32"],
       lambda a, b, f=function: f(a, b) or math.isnan(a) or math.isnan(b), {})
      for op, function in COMPARED.items()],
    ("setp.num.f32 {d}, {0}, {1}", "pred", ["f32", "f32"], lambda a, b: not (math.isnan(a) or math.isnan(b)), {}),
    ("setp.nan.f32 {d}, {0}, {1}", "pred", ["f32", "f32"], lambda a, b: math.isnan(a) or math.isnan(b), {}),
    ("setp.gt.ftz.f32 {d}, {0}, {1}", "pred", ["f32", "f32"], lambda a, b: flushed(a) > flushed(b),
     {0: [*SMALL, 0.0, 1.0], 1: [*SMALL, 0.0, -1.0]}),
    *[(f"setp.{op}.{kind} {{d}}, {{0}}, {{1}}", "pred", [kind, kind], function, {})
      for kind in ("s16", "u16", "s32", "u32", "s64", "u64") for op, function in COMPARED.items()],
    *[(f"setp.{op}.u32 {{d}}, {{0}}, {{1}}", "pred", ["u32", "u32"], COMPARED[same], {})
      for op, same in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items()],
    *[(f"setp.lt.{op}.s32 {{d}}, {{0}}, {{1}}, !{{2}}", "pred", ["s32", "s32", "pred"], function, {})
      for op, function in {"and": lambda a, b, c: a < b and not c, "or": lambda a, b, c: a < b or not c,
                           "xor": lambda a, b, c: (a < b) != (not c)}.items()],
    # The second result is the opposite comparison, even if the first result overwrites the third operand.
    ("mov.pred %p8, {2}; setp.lt.and.s32 %p8|{d}, {0}, {1}, %p8", "pred", ["s32", "s32", "pred"],
     lambda a, b, c: not a < b and c, {}),
    *[(f"selp.{kind} {{d}}, {{0}}, {{1}}, {{2}}", kind, [kind, kind, "pred"], lambda a, b, c: a if c else b, {})
      for kind in ("b16", "s32", "b64", "f32")],
    # Packed registers: the first has the low bits.
    ("mov.b32 {d}, {{{0}, {1}}}", "b32", ["b16", "b16"], lambda a, b: a | b << 16, {}),
    ("mov.b64 {d}, {{{0}, {1}}}", "b64", ["b32", "b32"], lambda a, b: a | b << 32, {}),
    ("mov.b64 {d}, {{{0}, {1}, {2}, {3}}}", "b64", ["b16"] * 4,
     lambda a, b, c, d: a | b << 16 | c << 32 | d << 48, {}),
    ("mov.b64 {{_, {d}}}, {0}", "b32", ["b64"], lambda a: a >> 32, {}),
    ("mov.b32 {{{d}, %h3}}, {0}", "b16", ["b32"], lambda a: a & 0xFFFF, {}),
    # Conversions.
    *[(f"cvt.{out}.{kind} {{d}}, {{0}}", out, [kind], lambda a: a, {})
      for out, kind in [("s32", "s16"), ("u32", "u16"), ("u32", "s16"), ("s64", "s32"), ("u64", "u32"), ("u64", "s32"),
                        ("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")]],
    ("cvt.u32.u8 {d}, {0}", "u32", ["b16"], lambda a: a & 255, {0: [0x1234, 0xFF80, 0x7F]}),
    ("cvt.s32.s8 {d}, {0}", "s32", ["b16"], lambda a: decode("s8", a), {0: [0x1234, 0xFF80, 0x7F]}),
    ("cvt.s32.s8 {d}, {0}", "s32", ["b32"], lambda a: decode("s8", a), {}),
    ("cvt.s16.s8 {d}, {0}", "s16", ["b16"], lambda a: decode("s8", a), {0: [0x1234, 0xFF80, 0x7F]}),
    ("cvt.s8.s32 {d}, {0}", "s16", ["s32"], lambda a: decode("s8", a & 255), {}),
    ("cvt.u8.u32 {d}, {0}", "u16", ["u32"], lambda a: a & 255, {}),
    *[(f"cvt.rn.f32.{kind} {{d}}, {{0}}", "f32", [kind], lambda a: np.float32(a),
       {0: [*EDGES[kind], 2**24 + 1, 2**24 + 3]})
      for kind in ("s32", "u32", "s64", "u64")],
    *[(f"cvt.{how}.{kind}.f32 {{d}}, {{0}}", kind, ["f32"], clamped(kind, rounding), {0: EDGES["f32"] + ROUNDED})
      for kind in ("s32", "u32")
      for how, rounding in {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}.items()],
    ("cvt.rpi.ftz.s32.f32 {d}, {0}", "s32", ["f32"], lambda a: math.ceil(flushed(a)), {0: [*SMALL, 0.5, -0.5]}),
    ("cvt.rpi.ftz.f32.f32 {d}, {0}", "f32", ["f32"], lambda a: float(math.ceil(flushed(a))), {0: [SMALL[0], 1.5]}),
    *[(f"cvt.rn.{name}x2.f32 {{d}}, {{0}}, {{1}}", "b32", ["f32", "f32"], pair(kind), {0: EDGES["f32"] + ROUNDED})
      for name, kind in {"bf16": ml_dtypes.bfloat16, "f16": np.float16}.items()],
    *[(f"cvt.rn.relu.{name}x2.f32 {{d}}, {{0}}, {{1}}", "b32", ["f32", "f32"], pair(kind, relu=True),
       {0: [1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0, math.nan, math.inf, -math.inf]})
      for name, kind in {"bf16": ml_dtypes.bfloat16, "f16": np.float16}.items()],
    *[(f"cvt.rn.{name}.f32 {{d}}, {{0}}", "b16", ["f32"], lambda a, kind=kind: half(kind, a),
       {0: EDGES["f32"] + ROUNDED + [1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 1.0 + 2.0**-11, 65519.0, 65520.0, 2.0**-25]})
      for name, kind in {"bf16": ml_dtypes.bfloat16, "f16": np.float16}.items()],
    *[(f"cvt.f32.{name} {{d}}, {{0}}", "f32", ["b16"],
       lambda a, kind=kind: float(np.array(a, np.uint16).view(kind)),
       {0: [0, 1, 0x3C00, 0x3F80, 0xC123, 0x7C00, 0xFF80]})
      for name, kind in {"bf16": ml_dtypes.bfloat16, "f16": np.float16}.items()],
]  # fmt: skip


@pytest.mark.parametrize("text, out, kinds, function, values", TABLE, ids=[f"{row[0]}"[:40] for row in TABLE])
def test_an_instruction_computes_what_python_does(text, out, kinds, function, values):
    cases = list(itertools.product(*(values.get(i, EDGES[kind]) for i, kind in enumerate(kinds))))[:1024]
    expected = [encode(out, function(*case)) for case in cases]
    for odd_lanes_only in (False, True):
        got = written.apply(text, out, kinds, cases, odd_lanes_only=odd_lanes_only)
        untouched = encode(out, 0 if out == "pred" else decode(out, written.MASKED_OFF & (1 << written.BITS[out]) - 1))
        for i, (case, want, have) in enumerate(zip(cases, expected, got, strict=True)):
            if odd_lanes_only and i % 2 == 0:
                want = untouched
            both_are_nan = out == "f32" and math.isnan(have) and math.isnan(decode(out, want))
            assert both_are_nan or encode(out, have) == want, (case, have, decode(out, want))
