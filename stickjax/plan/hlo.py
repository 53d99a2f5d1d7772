"""Find the collectives of a compiled program: how often each runs, its bytes, and the mesh axes over which it runs.

The collectives are read from the text (HLO) of the optimised program, because XLA merges, splits and moves them.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# %name = TYPE operation(operands), attributes
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<operation>[a-z][a-z\-]*)\((?P<rest>.*)$")
_COLLECTIVE = re.compile(rf"^({'|'.join(KINDS)})(-start)?$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """A collective of a compiled program. `kind` is one of KINDS, such as "all-gather".

    The devices are divided into groups, and the devices of a group communicate. `bytes`: the size of the input or of
    the output on one device, whichever is larger. `count`: how often the collective runs when the program runs once.
    """

    kind: str
    axes: tuple[str, ...]  # the mesh axes over which it runs
    devices: int  # the number of devices in a group
    bytes: int
    count: float
    local: bool  # whether every group is within one host

    @property
    def sent(self) -> float:
        """The number of bytes that one device sends when the collective runs once, if each group is a ring."""
        share = (self.devices - 1) / self.devices
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mesh | None, per_host: int | None = None) -> list[Collective]:
    """Return the collectives of a compiled program. A collective is left out if its groups have only one device.

    Args:
      text: the HLO of the program, `compiled.as_text()`.
      mesh: the mesh for which the program was compiled; None: the program has one device, and no collectives.
      per_host: the number of devices of a host. The devices with the ids 0 to per_host - 1 are on the first host, and
        so on. None: there is one host.
    """
    if mesh is None:
        return []
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.match(line) if runs[name] else None
            if match and (kind := _COLLECTIVE.match(match["operation"])):
                found.append(_collective(kind[1], bool(kind[2]), match["type"], line, runs[name], mesh, per_host))
    return [collective for collective in found if collective.devices > 1]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Split the HLO of a program into its computations.

    Return ({name of a computation: its lines}, the name of the computation where the program starts).
    """
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            current = computations.setdefault(header["name"], []) if header else None
            entry = header["name"] if header and header[1] else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, float]:
    """Return {name of a computation: how often it runs}, if the computation `entry` runs once.

    `computations` is {name: its lines of HLO}. The body of a loop runs as often as the trip count in the HLO says, or
    once if there is no trip count. All branches of a conditional count as taken.
    """
    calls = {name: [] for name in computations}
    for name, lines in computations.items():
        for line in lines:
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            if re.search(r" [a-z\-]+-(done|update)\(", line):
                continue  # its -start instruction calls the same computation
            called = [target for _, target in _CALLED.findall(line)]
            if branches := _BRANCHES.search(line):
                called += [target.strip().lstrip("%") for target in branches[1].split(",")]
            calls[name] += [(target, trips if " while(" in line else 1) for target in called if target in calls]
    runs = defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for target, trips in calls[name]:
            visit(target, times * trips)

    visit(entry, 1)
    return runs


def _collective(kind, start, type_, line, count, mesh, per_host) -> Collective:
    result = _parts(type_)[1] if start and len(_parts(type_)) > 1 else type_
    groups = _groups(line, mesh)
    devices = max(len(group) for group in groups)
    size = _bytes(result) * (devices if kind == "reduce-scatter" else 1)
    where = np.array([device.id for device in mesh.devices.flat])
    hosts = where // (per_host or where.max() + 1)
    local = all(len({hosts[i] for i in group}) == 1 for group in groups)
    if kind == "collective-permute":
        devices = 2
    return Collective(kind, _axes(groups, mesh), devices, size, count, local)


def _parts(type_: str) -> list[str]:
    """Split the text of an HLO type, such as "(f32[2,3], s32[])", into the members of the tuple: ["f32[2,3]", "s32[]"].

    A type that is not a tuple is returned as the only member.
    """
    if not type_.startswith("("):
        return [type_]
    parts, depth = [""], 0
    for letter in type_[1:-1]:
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]


def _bytes(type_: str) -> int:
    """Return the bytes of all arrays in an HLO type, which is given as text.

    >>> _bytes("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0})")
    32
    """
    total = 0
    for name, shape in re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", type_):
        bits = _BITS.get(name) or int(re.search(r"\d+", name)[0])
        total += math.prod(int(n) for n in shape.split(",") if n) * bits // 8
    return total


def _groups(line: str, mesh: Mesh) -> np.ndarray | list[list[int]]:
    """Return the groups of devices that communicate in a collective. `line` is its line of HLO.

    A device is given as its index in `mesh.devices.flat`. For a collective-permute, each pair of a source and a target
    is a group. If the line has no groups, all devices are one group.
    """
    everything = [list(range(mesh.size))]
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", line):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d, ]+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(n) for n in x.split(",")] if x else None for x in iota.groups())
        places = np.arange(math.prod(dims)).reshape(dims)
        return (places if order is None else places.transpose(order)).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:,? ?device_ids=\([^)]*\))? ?\{(.*?)\}", line):
        return _named_groups(named[1], named[2])
    return everything


def _named_groups(mesh: str, axes: str) -> list[list[int]]:
    """Return the groups of devices that XLA writes in the form mesh['a'=2,'b'=8] {'a','b':(2)4}.

    `mesh` is the text in the square brackets: all mesh axes with their sizes. `axes` is the text in the braces: the
    axes along which the devices of a group differ. In the example, 'b':(2)4 means that the axis b of size 8 is reshaped
    to (2, 4), and that the devices of a group differ only along the second part, of size 4. So there are 2 groups of
    2 * 4 = 8 devices.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(.*?)'=(\d+)", mesh)}
    chosen = re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?", axes)
    dims, wanted = [], []
    for name, size in sizes.items():
        cuts = {1, size}
        parts = [(int(before), int(before) * int(n)) for axis, before, n in chosen if axis == name and before]
        for part in parts:
            cuts |= set(part)
        whole = any(axis == name and not before for axis, before, _ in chosen)
        edges = sorted(cuts) if size > 1 else [1, 1]
        for low, high in zip(edges, edges[1:], strict=False):
            if whole or any(low >= a and high <= b for a, b in parts):
                wanted.append(len(dims))
            dims.append(high // low)
    rest = [i for i in range(len(dims)) if i not in wanted]
    places = np.arange(math.prod(dims)).reshape(dims).transpose(rest + wanted)
    return places.reshape(-1, math.prod(dims[i] for i in wanted)).tolist()


def _axes(groups, mesh: Mesh) -> tuple[str, ...]:
    """Return the names of the mesh axes over which a collective runs: the devices of a group differ along these axes.

    `groups` is a list of groups. A group is a list of devices, given as indices in `mesh.devices.flat`.
    """
    at = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    differs = np.zeros(at.shape[1], bool)
    for group in groups:
        differs |= (at[group] != at[group[0]]).any(0)
    return tuple(str(name) for name, d in zip(mesh.axis_names, differs, strict=True) if d)
