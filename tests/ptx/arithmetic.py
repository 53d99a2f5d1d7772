"""PTX instructions that compute within one lane: arithmetic, comparisons, conversions and moves.

A float32 fma is computed in float64 and then rounded to float32. So it is rounded twice, and on the chip only once; the
results differ in about one of 2^29 cases. Approximate instructions such as ex2 use NumPy's functions, rounded to
float32.
"""

import numpy as np

from .decode import DTYPES, UnknownInstruction, bfloat16_to_float32, float32_to_bfloat16, instruction, width

WARP = 32


def _flushed(x):
    """Return the float32 numbers x, with each denormal number replaced by a zero of the same sign, as `.ftz` does."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _elementwise(decoder, x, kind, function, out_kind=None, ftz=False):
    """Decode instruction x, which computes d = function(a, b, ..) in each lane, into the function that executes it.

    The first operand is d, of type `out_kind` (None: `kind`). The other operands have type `kind`. With `ftz`, denormal
    numbers in the operands and in the result become zero.
    """
    write = decoder.write(x.operands[0], out_kind or kind)
    reads = [decoder.read(operand, kind) for operand in x.operands[1:]]
    if ftz:

        def run(u, mask):
            write(u, mask, _flushed(function(*[_flushed(read(u)) for read in reads])))

        return run
    if len(reads) == 2:
        first, second = reads
        return lambda u, mask: write(u, mask, function(first(u), second(u)))
    return lambda u, mask: write(u, mask, function(*[read(u) for read in reads]))


_FLOAT = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "div": np.divide,
}


@instruction(r"(?P<name>add|sub|mul|neg|abs|min|max|div)(?:\.rn|\.full|\.approx)?(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.f32")
def float_operation(decoder, x, match):
    nan = {"min": np.minimum, "max": np.maximum}
    function = nan[match["name"]] if match["nan"] else _FLOAT[match["name"]]
    return _elementwise(decoder, x, "f32", function, ftz=bool(match["ftz"]))


@instruction(r"fma\.rn(?P<ftz>\.ftz)?\.f32")
def fused_multiply_add(decoder, x, match):
    def fma(a, b, c):
        return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)

    return _elementwise(decoder, x, "f32", fma, ftz=bool(match["ftz"]))


_APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: np.float32(1) / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@instruction(r"(?P<name>ex2|lg2|rcp|sqrt|rsqrt|tanh|sin|cos)\.(?:approx|rn)(?P<ftz>\.ftz)?\.f32")
def approximate(decoder, x, match):
    return _elementwise(decoder, x, "f32", _APPROXIMATE[match["name"]], ftz=bool(match["ftz"]))


def _shift_left(bits):
    return lambda a, n: np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), 0)


def _shift_right(bits, signed):
    def run(a, n):
        shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
        return shifted if signed else np.where(n < bits, shifted, 0)

    return run


_INTEGER = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
}


@instruction(r"(?P<name>add|sub|min|max|neg|abs)\.(?P<kind>[su](?:16|32|64))")
@instruction(r"(?P<name>and|or|xor|not)\.(?P<kind>b(?:16|32|64)|pred)")
def integer_operation(decoder, x, match):
    return _elementwise(decoder, x, match["kind"], _INTEGER[match["name"]])


@instruction(r"(?P<name>shl|shr)\.(?P<kind>[bsu](?P<bits>16|32|64))")
def shift(decoder, x, match):
    kind, bits = match["kind"], np.uint32(match["bits"])
    function = _shift_left(bits) if match["name"] == "shl" else _shift_right(bits, kind[0] == "s")
    write, value = decoder.write(x.operands[0], kind), decoder.read(x.operands[1], kind)
    count = decoder.read(x.operands[2], "u32")
    return lambda u, mask: write(u, mask, function(np.asarray(value(u)), np.asarray(count(u))))


def _high(kind):
    """Return a function of two integer arrays that gives the upper half of their products, as `mul.hi` does.

    `kind` is the type of the integers: "s32", "u32" or "u64".
    """
    if kind in ("s32", "u32"):
        wide = np.int64 if kind == "s32" else np.uint64
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(DTYPES[kind])
    if kind != "u64":
        raise UnknownInstruction(f"the PTX machine supports .hi only for s32, u32 and u64, not for {kind}")

    def run(a, b):
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
        a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
        middle = a1 * b0 + ((a0 * b0) >> half)
        other = a0 * b1 + (middle & low)
        return a1 * b1 + (middle >> half) + (other >> half)

    return run


@instruction(r"(?P<name>mul|mad)\.(?P<part>lo|hi|wide)\.(?P<kind>[su](?:16|32|64))")
def integer_product(decoder, x, match):
    kind, part = match["kind"], match["part"]
    out = kind[0] + str(2 * int(kind[1:])) if part == "wide" else kind
    dtype = DTYPES[out]
    multiply = _high(kind) if part == "hi" else (lambda a, b: np.multiply(a, b, dtype=dtype))
    write, a, b = decoder.write(x.operands[0], out), *(decoder.read(o, kind) for o in x.operands[1:3])
    if match["name"] == "mul":
        return lambda u, mask: write(u, mask, multiply(a(u), b(u)))
    c = decoder.read(x.operands[3], out)
    return lambda u, mask: write(u, mask, multiply(a(u), b(u)) + c(u))


@instruction(r"(?P<name>div|rem)\.(?P<kind>[su](?:32|64))")
def integer_division(decoder, x, match):
    """Decode instruction x, an integer div or rem that rounds toward zero, into the function that executes it.

    A division by zero gives an unspecified result on the chip; here it raises ZeroDivisionError.
    """
    kind, is_quotient = match["kind"], match["name"] == "div"
    write, a, b = decoder.write(x.operands[0], kind), *(decoder.read(o, kind) for o in x.operands[1:])

    def run(u, mask):
        dividend, divisor = (np.broadcast_to(read(u), (u.lanes,)) for read in (a, b))
        is_zero = divisor == 0
        if np.any(is_zero if mask is None else is_zero & mask):
            raise ZeroDivisionError(x.text)
        divisor = np.where(is_zero, np.ones_like(divisor), divisor)  # in lanes that take no part
        remainder = np.fmod(dividend, divisor)  # has the sign of the dividend, also for the smallest integer
        write(u, mask, (dividend - remainder) // divisor if is_quotient else remainder)

    return run


_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name, kind):
    """Return the function of two arrays that the PTX comparison `name` computes, for operands of type `kind`.

    For floats, eq, ne, lt, .. are false if an operand is NaN, while equ, neu, ltu, .. are true.
    """
    if kind[0] != "f":
        return _COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    base, unordered = (name[:2], True) if len(name) == 3 else (name, False)
    compare = _COMPARISONS[base]
    if unordered:
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction(
    r"setp\.(?P<name>[a-z]{2,3})(?:\.(?P<boolean>and|or|xor))?(?P<ftz>\.ftz)?\.(?P<kind>[bsu](?:16|32|64)|f32)"
)
def set_predicate(decoder, x, match):
    target, a, b = x.operands[:3]
    compare = _comparison(match["name"], match["kind"])
    a, b = (decoder.read(o, match["kind"]) for o in (a, b))
    targets = target.parts if target.kind == "pair" else (target,)
    writes = [decoder.write(t, "pred") for t in targets]
    if match["boolean"]:
        combine, other = _BOOLEAN[match["boolean"]], decoder.read(x.operands[3], "pred")

    def run(u, mask):
        first, second = (_flushed(read(u)) if match["ftz"] else read(u) for read in (a, b))
        result = compare(first, second)
        results = [result, ~result][: len(writes)]
        if match["boolean"]:
            results = [combine(value, other(u)) for value in results]
        for write, value in zip(writes, results, strict=True):
            write(u, mask, value)

    return run


@instruction(r"selp\.(?P<kind>[bsuf](?:16|32|64))")
def select(decoder, x, match):
    kind = match["kind"]
    write, a, b = decoder.write(x.operands[0], kind), *(decoder.read(o, kind) for o in x.operands[1:3])
    chosen = decoder.read(x.operands[3], "pred")
    return lambda u, mask: write(u, mask, np.where(chosen(u), a(u), b(u)))


@instruction(r"mov\.(?P<kind>[bsuf](?:16|32|64)|pred)")
def move(decoder, x, match):
    """Decode instruction x, a mov, into the function that executes it.

    A mov copies a register, packs several registers into a wider one, or unpacks one into several. The first of several
    registers has the lowest bits.
    """
    target, source = x.operands
    kind = match["kind"]
    if target.kind != "vector" and source.kind != "vector":
        write, read = decoder.write(target, kind), decoder.read(source, kind)
        return lambda u, mask: write(u, mask, read(u))
    parts = target.parts if target.kind == "vector" else source.parts
    bits = int(kind[1:]) // len(parts)
    if bits < 16:
        raise UnknownInstruction(f"the PTX machine does not support this instruction: {x.text}")
    part = f"b{bits}"
    if target.kind == "vector":
        read, writes = decoder.read(source, f"b{kind[1:]}"), [decoder.write(p, part) for p in parts]

        def unpack(u, mask):
            value = np.asarray(read(u))
            for i, write in enumerate(writes):
                write(u, mask, (value >> value.dtype.type(i * bits)).astype(DTYPES[part]))

        return unpack
    write, reads = decoder.write(target, f"b{kind[1:]}"), [decoder.read(p, part) for p in parts]
    dtype = DTYPES[f"b{kind[1:]}"]

    def pack(u, mask):
        write(u, mask, sum(np.asarray(r(u)).astype(dtype) << dtype(i * bits) for i, r in enumerate(reads)))

    return pack


@instruction(r"cvta(?:\.to)?\.(?:global|shared|param|local)\.u64|cvta\.u64")
def convert_address(decoder, x, match):
    """Decode instruction x, a cvta, into the function that executes it.

    A cvta converts an address from one address space to another. The PTX machine has a single address space for all
    kinds of memory, so the function only copies the address.
    """
    write, read = decoder.write(x.operands[0], "u64"), decoder.read(x.operands[1], "u64")
    return lambda u, mask: write(u, mask, read(u))


@instruction(r"cvt\.(?P<out>[bsu](?:8|16|32|64))\.(?P<kind>[bsu](?:8|16|32|64))")
def convert_integer(decoder, x, match):
    out, kind = match["out"], match["kind"]
    held = decoder.rows[x.operands[0].text][0]  # a narrow result is extended, by its sign, to a wider register
    source = x.operands[1]  # only the lowest bits of a wider register are used
    wider = decoder.rows[source.text][0] if source.kind == "register" else width(kind)
    write, read = decoder.write(x.operands[0], held), decoder.read(source, wider)

    def run(u, mask):
        value = np.asarray(read(u)).astype(DTYPES[kind]).astype(DTYPES[out])
        wide = np.int64 if out[0] == "s" else np.uint64
        write(u, mask, value.astype(wide).astype(DTYPES[held]))

    return run


@instruction(r"cvt\.rn\.f32\.(?P<kind>[su](?:32|64))")
def integer_to_float(decoder, x, match):
    write, read = decoder.write(x.operands[0], "f32"), decoder.read(x.operands[1], match["kind"])
    return lambda u, mask: write(u, mask, np.asarray(read(u)).astype(np.float32))


@instruction(r"cvt\.(?P<how>rzi|rni|rmi|rpi)(?P<ftz>\.ftz)?\.(?P<kind>[su]32|f32)\.f32")
def float_to_integer(decoder, x, match):
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[match["how"]]
    kind = match["kind"]
    write, number = decoder.write(x.operands[0], kind), decoder.read(x.operands[1], "f32")
    read = (lambda u: _flushed(number(u))) if match["ftz"] else number
    if kind == "f32":
        return lambda u, mask: write(u, mask, rounding(read(u)))
    limits = np.iinfo(DTYPES[kind])

    def run(u, mask):
        value = np.nan_to_num(rounding(np.asarray(read(u)).astype(np.float64)))
        write(u, mask, np.clip(value, limits.min, limits.max).astype(DTYPES[kind]))

    return run


def _half_bits(kind):
    """Return a function from float32 numbers to their 16 bits as bfloat16 (`kind` "bf16") or float16 ("f16").

    NaN becomes 0x7fff, as on the chip.
    """
    if kind == "bf16":
        return float32_to_bfloat16
    return lambda x: np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x).astype(np.float16).view(np.uint16))


@instruction(r"cvt\.rn(?P<relu>\.relu)?\.(?P<kind>bf16|f16)x2\.f32")
def convert_pair(decoder, x, match):
    """Decode instruction x, a cvt of two float32 numbers to 16 bits each, into the function that executes it.

    Both 16-bit numbers go into one 32-bit register: the first number into the upper half, the second into the lower
    half.
    """
    bits, relu = _half_bits(match["kind"]), match["relu"]
    write, high, low = decoder.write(x.operands[0], "b32"), *(decoder.read(o, "f32") for o in x.operands[1:])

    def run(u, mask):
        a, b = (np.asarray(read(u), np.float32) for read in (high, low))
        if relu:
            a, b = (np.where(v <= 0, np.float32(0), v) for v in (a, b))  # NaN stays NaN
        write(u, mask, bits(a).astype(np.uint32) << np.uint32(16) | bits(b))

    return run


@instruction(r"cvt\.rn\.(?P<kind>bf16|f16)\.f32")
def convert_to_half(decoder, x, match):
    bits = _half_bits(match["kind"])
    write, read = decoder.write(x.operands[0], "b16"), decoder.read(x.operands[1], "f32")
    return lambda u, mask: write(u, mask, bits(np.asarray(read(u), np.float32)))


@instruction(r"cvt\.f32\.(?P<kind>bf16|f16)|cvt\.ftz\.f32\.f16")
def convert_from_half(decoder, x, match):
    write, read = decoder.write(x.operands[0], "f32"), decoder.read(x.operands[1], "b16")
    if match["kind"] == "bf16":
        return lambda u, mask: write(u, mask, bfloat16_to_float32(np.asarray(read(u))))
    return lambda u, mask: write(u, mask, np.asarray(read(u)).view(np.float16).astype(np.float32))
