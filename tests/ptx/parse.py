"""A parser of PTX text with one kernel. It returns the kernel's registers, variables, instructions and labels.

Scopes of inline assembly (`{ .reg .pred p; ... }`) have their own registers and labels. The parser appends the number
of the scope to these names, so that the result is one flat list of instructions.
"""

import re
from typing import NamedTuple

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LINE_DIRECTIVE = re.compile(
    r"^\s*\.(?:loc|file|section|version|target|address_size|maxn\w+|minn\w+|reqn\w+)\b[^\n;{]*", re.M
)
_LABEL = re.compile(r"\s*([$\w]+)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_PART = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,])+")
_REGISTERS = re.compile(r"([%\w]+?)<(\d+)>")


class Operand(NamedTuple):
    """An operand of a PTX instruction. `kind` says which of the other fields are used."""

    kind: str  # "register", "number", "address", "vector", "pair" (predicate d|p), "name", "nothing"
    text: str = ""  # a register or name; in an address, the base register or name, or ""
    value: int | float = 0  # the value of a number, or the offset of an address
    parts: tuple["Operand", ...] = ()  # the elements of a vector or pair, or the coordinates of an address
    is_negated: bool = False  # whether a predicate is negated


class Instruction(NamedTuple):
    op: str  # the opcode with its modifiers: "fma.rn.f32"
    operands: tuple[Operand, ...]
    predicate: str | None
    predicate_is_negated: bool
    text: str  # the instruction in the PTX

    @property
    def base(self) -> str:
        return self.op.split(".")[0]


class Kernel(NamedTuple):
    name: str
    parameters: tuple[tuple[str, int], ...]  # (name, bytes)
    registers: dict[str, str]  # the type of each register: "pred", "b16", "b32", "b64", "f32"
    variables: dict[str, tuple[str, int, int]]  # by name: (state space, alignment, bytes); 0 bytes: dynamic
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # by name: the index of the instruction after the label


SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
         "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip


def parse(ptx: str) -> Kernel:
    """Parse PTX text with exactly one kernel; return the kernel. Raises ValueError for unsupported PTX."""
    ptx = _LINE_DIRECTIVE.sub("", _COMMENT.sub("", ptx))
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\(", ptx))
    if len(entries) != 1:
        raise ValueError(f"the PTX has {len(entries)} kernels (.entry); expected 1")
    if re.search(r"^\s*(?:\.\w+\s+)*\.func\b", ptx, re.M):
        raise ValueError("the PTX has functions (.func); the PTX machine runs only a kernel without them")
    entry = entries[0]
    end = ptx.index(")", entry.end())
    reader = _Reader(_body(ptx, ptx.index("{", end)))
    for line in re.findall(r"(?:\.visible|\.extern|\.global|\.const)[^;{]*\.shared[^;]*;", ptx[: entry.start()]):
        reader.declare(line.strip(" ;").removeprefix(".extern ").removeprefix(".visible "))
    parameters = tuple(map(_parameter, filter(str.strip, ptx[entry.end() : end].split(","))))
    reader.read()
    return Kernel(entry[1], parameters, reader.registers, reader.variables, tuple(reader.instructions), reader.labels)


def _body(ptx: str, start: int) -> str:
    """Return the text between the brace at index `start` of `ptx` and the brace that closes it."""
    depth = 0
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return ptx[start + 1 : start + brace.start()]
    raise ValueError("the PTX has no closing brace")


def _parameter(line: str) -> tuple[str, int]:
    match = re.search(r"\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)*)?(?:\s+\.align\s+\d+)?\s+([$\w]+)(?:\[(\d+)\])?\s*$", line)
    aligned = re.search(r"\.align\s+\d+\s+\.b8\s+([$\w]+)\[(\d+)\]", line)
    if aligned:
        return aligned[1], int(aligned[2])
    if not match:
        match = re.search(r"\.([busf]\d+)\b.*?([$\w]+)\s*$", line.strip())
    kind = re.search(r"\.([busf]\d+)\b", line)[1]
    return match[2], SIZES[kind]


class _Reader:
    """Reads the statements of a kernel's body, including its nested scopes."""

    def __init__(self, body: str):
        self.body, self.at = body, 0
        self.registers, self.variables, self.labels = {}, {}, {}
        self.instructions: list[Instruction] = []
        self.scopes: list[tuple[str, set[str]]] = [("", set())]  # (suffix, names that the scope declares)
        self.count = 0

    def read(self) -> None:
        body = self.body
        while True:
            while self.at < len(body) and body[self.at].isspace():
                self.at += 1
            if self.at >= len(body):
                return
            if body[self.at] == "{":
                self._enter()
            elif body[self.at] == "}":
                self.scopes.pop()
                self.at += 1
            elif body[self.at] == ";":
                self.at += 1
            elif match := _LABEL.match(body, self.at):
                self.labels[self._name(match[1])] = len(self.instructions)
                self.at = match.end()
            else:
                stop = body.index(";", self.at)
                self._statement(body[self.at : stop].strip())
                self.at = stop + 1

    def _enter(self) -> None:
        """Enter a scope, and collect the names that it declares.

        A jump may name a label that comes later, so all labels of the scope must be known first.
        """
        inside = _body(self.body, self.at)
        self.count += 1
        own = set()
        for declared in re.findall(r"\.reg\s+\.\w+\s+([^;]*);", inside):
            own |= {name.strip() for name in declared.split(",")}
        own |= set(re.findall(r"(?:^|[;{}])\s*([$\w]+)\s*:(?!:)", inside))
        self.scopes.append((f"#{self.count}", own))
        self.at += 1

    def _name(self, name: str) -> str:
        for suffix, own in reversed(self.scopes):
            if name in own:
                return name + suffix
        return name

    def _statement(self, text: str) -> None:
        if text.startswith("."):
            return self.declare(text)
        match = _INSTRUCTION.fullmatch(text)
        if not match:
            raise ValueError(f"not an instruction: {text}")
        negated, predicate, op, rest = match.groups()
        operands = tuple(self._operand(part) for part in _split(rest))
        predicate = predicate and self._name(predicate)
        self.instructions.append(Instruction(op, operands, predicate, bool(negated), " ".join(text.split())))

    def declare(self, text: str) -> None:
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            for name in match[2].split(","):
                name = name.strip()
                if many := _REGISTERS.fullmatch(name):
                    self.registers.update({f"{many[1]}{i}": match[1] for i in range(int(many[2]))})
                else:
                    self.registers[self._name(name)] = match[1]
        elif match := re.match(
            r"\.(shared|local|global)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([$\w]+)(?:\[(\d*)\])?$", text, re.S
        ):
            space, alignment, kind, name, count = match.groups()
            size = 0 if count == "" else SIZES[kind] * int(count or 1)
            if count is None and kind == "b8":
                size = 0  # this is how Mosaic declares its dynamic shared memory
            self.variables[name] = space, int(alignment or SIZES[kind]), size
        elif not text.startswith((".pragma", ".loc", ".file")):
            raise ValueError(f"the PTX machine does not support this declaration: {text}")

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if (name := self._name(text)) in self.registers:
            return Operand("register", name)
        if text == "_":
            return Operand("nothing")
        if text.startswith("{"):
            return Operand("vector", parts=tuple(map(self._operand, _split(text[1:-1]))))
        if text.startswith("["):
            return self._address(text[1:-1])
        if text.startswith("!"):
            return self._operand(text[1:])._replace(is_negated=True)
        if "|" in text:
            return Operand("pair", parts=tuple(map(self._operand, text.split("|"))))
        if (number := _number(text)) is not None:
            return Operand("number", text, number)
        return Operand("name", name)

    def _address(self, text: str) -> Operand:
        """Parse the text inside the brackets of an address: [base], [base+8], [8], or [descriptor, {x, y}]."""
        first, *rest = _split(text)
        coordinates = self._operand(rest[0]).parts if rest else ()
        match = re.fullmatch(r"\s*([%$A-Za-z_][%$\w]*)?\s*(?:\+?\s*(-?(?:0x[\da-fA-F]+|\d+)))?\s*", first)
        if not match:
            raise ValueError(f"not an address: [{text}]")
        name, offset = match.groups()
        return Operand("address", self._name(name) if name else "", int(offset or "0", 0), coordinates)


def _number(text: str) -> int | float | None:
    if re.fullmatch(r"0[fF][\da-fA-F]{8}", text):
        return int(text[2:], 16)  # the bits of a float32
    if re.fullmatch(r"0[dD][\da-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(?:0x[\da-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", text):
        raise ValueError(f"the operand {text} is a decimal fraction; PTX writes its bits, such as 0f3F000000 for 0.5")
    return None


def _split(text: str) -> list[str]:
    """Split a list of operands at the commas that are not inside braces or brackets."""
    return [part for part in _PART.findall(text) if part.strip()]
