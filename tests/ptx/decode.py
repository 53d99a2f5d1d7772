"""Decoding of PTX: the registry of known instructions, and functions that read and write their operands.

A unit is up to four warps whose lanes execute each instruction together. Each of its registers is an array with one
number per lane. A decoded instruction is a function of (unit, mask). `mask` is None if all lanes of the unit execute
it, else a bool array [lanes].
"""

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from .parse import Instruction, Kernel, Operand

DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
# The type of the registers for values of a type: narrow values are kept in wider registers.
_HOLDS = {"pred": "pred", "b8": "b16", "u8": "b16", "s8": "b16"}
SPECIAL = {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
           "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid"}  # fmt: skip

# Opcodes whose first operand is not a register that they write.
_WRITES_NOTHING = {"st", "stmatrix", "cp", "bra", "bar", "mbarrier", "fence", "wgmma", "prefetch", "ret", "exit"}

_HANDLERS: list[tuple[re.Pattern, Callable]] = []


class UnknownInstruction(NotImplementedError):
    """Raised if the PTX machine does not support an instruction, one of its modifiers, or one of its operands."""


class Step(NamedTuple):
    """A decoded instruction: the function that executes it, its predicate, and the registers that it uses."""

    run: Callable  # (unit, mask) -> None, BLOCKED, or the index of the instruction to jump to; see machine.py
    predicate: int | None  # the row of the predicate's register
    negated: bool
    registers: frozenset  # names of the registers that it reads or writes
    written: frozenset  # names of the registers that it writes, as far as the machine needs them
    is_product: bool  # whether it is a wgmma, which may directly follow another wgmma on the same registers
    text: str


def instruction(pattern: str) -> Callable:
    """Return a decorator that registers a function as the handler of all opcodes that `pattern` matches completely.

    `pattern` is a regular expression. The handler is called as handler(decoder, instruction, match). It returns the
    function of (unit, mask) that executes the instruction.
    """

    def register(handler):
        _HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


@cache
def _handler(op: str) -> tuple[Callable, re.Match] | None:
    matches = ((handler, pattern.fullmatch(op)) for pattern, handler in _HANDLERS)
    return next((found for found in matches if found[1]), None)


@cache
def width(kind: str) -> str:
    """Return the type of the registers that hold values of type `kind`: "b32" for "s32"."""
    if kind in _HOLDS:
        return _HOLDS[kind]
    return {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64"}.get(kind, "b" + kind.lstrip("bsuf"))


class Decoder:
    """Decodes the instructions of one kernel for one launch.

    Args:
      kernel: the parsed kernel.
      variables: the address of each variable in shared memory, by name.
      parameters: the value of each kernel parameter, by name.
    """

    def __init__(self, kernel: Kernel, variables: dict[str, int], parameters: dict[str, int | bytes]):
        self.kernel, self.variables, self.parameters = kernel, variables, parameters
        self.rows: dict[str, tuple[str, int]] = {}  # by register name: the type of its register file, and its row there
        counts: dict[str, int] = {}
        for name, kind in kernel.registers.items():
            kind = width(kind)
            self.rows[name] = kind, counts.get(kind, 0)
            counts[kind] = counts.get(kind, 0) + 1
        self.counts = counts

    def steps(self) -> list[Step]:
        return [self._step(x) for x in self.kernel.instructions]

    def _step(self, x: Instruction) -> Step:
        found = _handler(x.op)
        if found is None:
            raise UnknownInstruction(f"the PTX machine does not support this instruction: {x.text}")
        handler, match = found
        try:
            run = handler(self, x, match)
        except (UnknownInstruction, ValueError, LookupError, AttributeError, TypeError) as error:
            # The handler supports the opcode, but not these operands.
            raise UnknownInstruction(f"the PTX machine cannot run this instruction: {x.text} ({error})") from error
        predicate = None if x.predicate is None else self.rows[x.predicate][1]
        base, registers = x.base, _registers(x.operands)
        written = _registers(x.operands[:1]) if base not in _WRITES_NOTHING else frozenset()
        return Step(run, predicate, x.predicate_is_negated, registers, written, base == "wgmma", x.text)

    def read(self, operand: Operand, kind: str) -> Callable:
        """Return a function from a unit to the values of an operand as type `kind`: an array [lanes] or one number."""
        if operand.kind == "register":
            held, row = self.rows[operand.text]
            if kind == "pred":
                if operand.is_negated:
                    return lambda u: ~u.files["pred"][row]
                return lambda u: u.files["pred"][row]
            if held != width(kind):
                raise UnknownInstruction(f"register {operand.text} has type .{held}, but is read as .{kind}")
            return lambda u: u.files[kind][row]
        if operand.kind == "number":
            value = self.constant(operand, kind)
            return lambda u: value
        if operand.kind == "name":
            if operand.text in SPECIAL:
                name = operand.text
                return lambda u: u.special[name].astype(DTYPES[kind])
            value = DTYPES[kind](self.address(operand.text))
            return lambda u: value
        raise UnknownInstruction(f"the PTX machine does not support this kind of operand here: {operand}")

    @staticmethod
    def constant(operand: Operand, kind: str):
        dtype = np.dtype(DTYPES[kind])
        if kind == "pred":
            return np.bool_(operand.value)
        bits = np.array(operand.value & (2 ** (8 * dtype.itemsize) - 1), np.dtype(f"u{dtype.itemsize}"))
        return bits.view(dtype)[()]

    def address(self, name: str) -> int:
        """Return the address of the variable or kernel parameter with this name."""
        if name in self.variables:
            return self.variables[name]
        if name in self.parameters:
            return PARAMETERS + list(self.parameters).index(name) * PARAMETER_BYTES
        raise UnknownInstruction(f"no variable or parameter has the name {name}")

    def write(self, operand: Operand, kind: str) -> Callable:
        """Return a function (unit, mask, values) that writes values of type `kind` into the register `operand`.

        For the operand "_", which PTX uses for an unwanted result, the function does nothing.
        """
        if operand.kind == "nothing":
            return lambda u, mask, values: None
        held, row = self.rows[operand.text]
        if held != width(kind):
            raise UnknownInstruction(f"register {operand.text} has type .{held}, but is written as .{kind}")

        def run(u, mask, values):
            if mask is None:
                u.files[kind][row][...] = values
            else:
                np.copyto(u.files[kind][row], values, where=mask)

        return run

    def pointer(self, operand: Operand) -> Callable:
        """Return a function from a unit to the addresses of an operand such as [%rd1+16].

        The addresses are an int64 array [lanes] or one number.
        """
        if not operand.text:
            value = np.int64(operand.value)
            return lambda u: value
        offset = operand.value
        if operand.text not in self.rows:
            value = np.int64(self.address(operand.text) + offset)
            return lambda u: value
        held, row = self.rows[operand.text]
        return lambda u: u.files[held][row].astype(np.int64) + offset


# The layout of the single address space: shared memory from 1024, parameters from 1 << 36, array i at (i + 1) << 40.
SHARED, PARAMETERS, PARAMETER_BYTES, ARRAY_SHIFT = 1024, 1 << 36, 1 << 20, 40


def _registers(operands: tuple[Operand, ...]) -> frozenset[str]:
    names = {x.text for x in operands if x.kind in ("register", "address") and x.text}
    return frozenset(names.union(*(_registers(x.parts) for x in operands if x.parts)))


def bfloat16_to_float32(x):
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(x):
    """Return the bits of x rounded to the nearest bfloat16, ties to even. NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)
