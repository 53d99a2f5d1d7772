"""An interpreter of the host code of a compiled kernel, which finds out how the kernel is launched.

The host code is a function that Mosaic GPU compiles for the CPU and prints as LLVM text. This function writes the
tensor maps and parameters of the kernel, and then launches the kernel. The function has no branches and no loops. The
interpreter gives every array an invented address, and recognises the array by this address later.
"""

import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from .program import TensorMap

MAP_BYTES = 128
# Bytes of an element, by the number of its type in Mosaic.
ITEMSIZES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2}
# Invented addresses: of the table of arrays, of the function's allocations, and of array i at (i + 1) * ARRAY.
TABLE, STACK, ARRAY = 1 << 16, 1 << 32, 1 << 48

BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "shl": operator.lshift, "or": operator.or_,
}  # fmt: skip
FLAGS = r"(?:(?:nuw|nsw|nusw|inbounds|disjoint) )*"
STATEMENTS = {
    "insertvalue": r"insertvalue \{[^}]*\} (\S+), \S+ (\S+), ([\d, ]+)",
    "extractvalue": r"extractvalue \{[^}]*\} (\S+), ([\d, ]+)",
    "field": r"getelementptr (\{.*\}), ptr (\S+), i32 0, i32 (\d+)",
    "element": rf"getelementptr {FLAGS}([^,{{]+), ptr (\S+), i\d+ (\S+)",
    "binary": rf"({'|'.join(BINARY)}) {FLAGS}i64 (\S+), (\S+)",
    "cast": r"(?:ptrtoint|inttoptr|sext|zext|trunc) \S+ (\S+) to \S+",
    "load": r"load (.+), ptr (\S+), align \d+",
    "alloca": r"alloca (.+?)(?:, i64 (\d+))?, align \d+",
    "store": r"store \S+ (\S+), ptr (\S+), align \d+",
    "call": r"call void @(\w+)\((.*)\)",
}


class Launch(NamedTuple):
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: tuple[int | bytes | tuple[TensorMap, ...], ...]


def read_launch(code: str) -> Launch:
    """Return the launch of a kernel: its grid, its block, its bytes of shared memory and its parameters.

    `code` is the LLVM text that contains the host function. Raises ValueError for unsupported code.
    """
    body = re.search(r"^define void @(?!_mlir_ciface)\w+\(ptr %0, ptr %1\) \{\n(.*?)^\}", code, re.M | re.S)
    if body is None:
        raise ValueError("the LLVM module has no host function, which is a function of two pointers")
    host = _Host()
    for line in body[1].splitlines():
        host.execute(line.strip())
    if host.launch is None:
        raise ValueError("the host function launches nothing: it does not call mosaic_gpu_build_kernel_spec")
    return host.launch


class _Host:
    """The state of the interpreted host function: its values by name, its memory by address, and the launch."""

    def __init__(self):
        self.values: dict[str, int | dict] = {"%0": 0, "%1": TABLE}
        self.memory: dict[int, int] = {}
        self.maps: dict[int, TensorMap] = {}
        self.top = STACK
        self.launch: Launch | None = None

    def execute(self, line: str) -> None:
        if not line or line.startswith(";") or line == "ret void":
            return
        name, statement = re.fullmatch(r"(?:(%\S+) = )?(.*)", line).groups()
        for kind, pattern in STATEMENTS.items():
            if match := re.fullmatch(pattern, statement):
                self.values[name] = getattr(self, f"_{kind}")(*match.groups())
                return
        raise ValueError(f"unknown statement in the host code: {line}")

    def value(self, text: str):
        if text in ("undef", "poison"):
            return {}
        return self.values[text] if text.startswith("%") else int(text)

    def _insertvalue(self, aggregate, value, index):
        return {**self.value(aggregate), index: self.value(value)}

    def _extractvalue(self, aggregate, index):
        return self.value(aggregate)[index]

    def _field(self, struct, base, index):
        return self.value(base) + sum(map(_size, _fields(struct)[: int(index)]))

    def _element(self, element, base, index):
        return self.value(base) + _size(element) * self.value(index)

    def _binary(self, op, a, b):
        return BINARY[op](self.value(a), self.value(b))

    def _cast(self, value):
        return self.value(value)

    def _load(self, kind, address):
        address = self.value(address)
        if kind.startswith("["):  # loads all tensor maps as one value, which nothing reads
            return None
        if TABLE <= address < STACK:
            return ((address - TABLE) // 8 + 1) * ARRAY
        return self.memory[address]

    def _alloca(self, kind, count):
        address = -(-self.top // MAP_BYTES) * MAP_BYTES
        self.top = address + _size(kind) * int(count or 1)
        return address

    def _store(self, value, address):
        self.memory[self.value(address)] = self.value(value)

    def _call(self, function, arguments):
        values = [self.value(x.split()[-1]) for x in arguments.split(", ")]
        if function == "mosaic_gpu_init_tma_desc":
            self._tensor_map(*values)
        elif function == "mosaic_gpu_build_kernel_spec":
            self._launch(*values)
        else:
            raise ValueError(f"unknown call in the host code: {function}")

    def _tensor_map(self, address, base, kind, rank, sizes, strides, swizzle, box):
        """Record a tensor map, as the host code's call of mosaic_gpu_init_tma_desc would make it.

        `sizes`, `strides` and `box` are addresses of arrays with one number per dimension. Mosaic orders the dimensions
        from the outermost to the innermost, and counts strides in elements. `TensorMap` orders the dimensions from the
        innermost to the outermost, and counts strides in bytes.
        """
        inwards = [[self.memory[start + 8 * i] for i in reversed(range(rank))] for start in (sizes, strides, box)]
        itemsize = ITEMSIZES[kind]
        self.maps[address] = TensorMap(
            array=base // ARRAY - 1,
            offset=base % ARRAY,
            itemsize=itemsize,
            sizes=tuple(inwards[0]),
            strides=tuple(itemsize * stride for stride in inwards[1]),
            box=tuple(inwards[2]),
            swizzle=swizzle,
        )

    def _launch(self, _, gx, gy, gz, cx, cy, cz, bx, by, bz, shared, early, count, pointers, sizes):
        if (cx, cy, cz, early) != (0, 0, 0, 0):
            raise ValueError(
                "the PTX machine supports only launches without clusters and without early start: the cluster sizes "
                f"{cx, cy, cz} and early={early} must be 0"
            )
        parameters = [self._parameter(self.memory[pointers + 8 * i], self.memory[sizes + 4 * i]) for i in range(count)]
        self.launch = Launch((gx, gy, gz), (bx, by, bz), shared, tuple(parameters))

    def _parameter(self, address, size):
        if size:  # passed by value
            return tuple(self.maps[address + place] for place in range(0, size, MAP_BYTES))
        pointer = self.memory[address]
        if pointer < ARRAY or pointer % ARRAY:
            raise ValueError(f"a parameter of the kernel is {pointer:#x}, which is the address of no array")
        return pointer // ARRAY - 1


def _fields(struct: str) -> list[str]:
    return struct.strip("{ }").split(", ")


def _size(kind: str) -> int:
    """Return the number of bytes of the LLVM type with the name `kind`.

    The size of a structure is the sum of the sizes of its fields, without padding. This holds for the host code: every
    field has 8 bytes, or it is an array of bytes and the last field.
    """
    if kind == "ptr":
        return 8
    if kind.startswith("{"):
        return sum(map(_size, _fields(kind)))
    if array := re.fullmatch(r"\[(\d+) x (.+)\]", kind):
        return int(array[1]) * _size(array[2])
    return int(kind.removeprefix("i")) // 8
