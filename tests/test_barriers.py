"""The barrier tables in docs/design agree with the Mosaic kernels.

Most tests trace the kernels, and record the barriers that each kernel declares and uses. The other tests read the PTX
of some kernels.
"""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from cases import Stick
from jax.experimental.pallas import mosaic_gpu as plgpu
from ptx import kept

from pallas_kernels import expert_linear, expert_mlp, platform, route, stick_breaking_attention
from pallas_kernels.scatter_moe.mosaic_row_pipeline import STAGES

PAGES = sorted((Path(__file__).parent.parent / "docs" / "design").glob("*_kernels.md"))
STICK = {  # kernels with one and with two compute warpgroups, with and without early exit, and a decode step
    "one warpgroup": (Stick(T=64, H=64), {"tiles": (64, 64)}),
    "two warpgroups": (Stick(T=200, H=64), {}),
    "early exit": (Stick(T=200, H=64), {"skip_below": -24.0}),
    "two widths, packed": (Stick(T=200, H=128, Hv=32, segments=(40, 160)), {}),
    "wide": (Stick(T=200, H=64, Hv=256), {}),
    "decoding": (Stick(T=1, S=1024, N=8, K=2, H=64), {}),
}
EXPERTS = {"few rows": (16, "swiglu"), "many rows": (512, "swiglu"), "not gated": (512, "gelu")}


class Barrier(NamedTuple):
    number: int
    arrivals: int


def name_of(path) -> str:
    """Return the name of the innermost named field in `path`, a key path of jax.tree_util.

    A path without named fields gives the text of the whole path.
    """
    names = [key.name for key in path if hasattr(key, "name")]
    return names[-1] if names else jax.tree_util.keystr(path)


class Traced:
    """One trace of a kernel: the barriers that it declares, and which operations arrive at or wait for each of them."""

    def __init__(self, scratch_types, warpgroups: int):
        named = [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(scratch_types)[0]]
        self.places = {name: i for i, (name, leaf) in enumerate(named) if isinstance(leaf, plgpu.Barrier)}
        declared = {name: named[place][1] for name, place in self.places.items()}
        self.barriers = {
            name: Barrier(math.prod(x.get_ref_aval().shape), x.num_arrivals) for name, x in declared.items()
        }
        self.sizes = {"W": warpgroups, "STAGES": STAGES}
        self.sizes["stages"] = next((leaf.shape[0] for name, leaf in named if name == "key"), None)
        self.sizes["tiles"] = sum(name == "query" for name, _ in named)  # of one step of the kernel d_key_value
        self.sizes["accumulators"] = sum(name == "weights" for name, _ in named)
        self.by: dict[str, set] = {name: set() for name in declared}
        self.waited: set[str] = set()

    def start(self, scratch) -> None:
        leaves = jax.tree.leaves(scratch)
        self.references = {name: leaves[place] for name, place in self.places.items()}

    def name(self, barrier) -> str:
        barrier = getattr(barrier, "ref", barrier)
        return next(name for name, reference in self.references.items() if reference is barrier)


@pytest.fixture(scope="module")
def traced():
    """Return a dict from the name of a kernel to its traces, one `Traced` for each time that the kernel was traced.

    During the tracing, replacements of Pallas' functions record the barriers.
    """
    found: dict[str, list[Traced]] = {}
    running: list[Traced] = []
    kernel, copy = plgpu.kernel, plgpu.copy_gmem_to_smem
    arrive, wait = plgpu.barrier_arrive, plgpu.barrier_wait

    def recorded_kernel(body, *, scratch_types, num_threads, **options):
        one = Traced(scratch_types, num_threads - 1)
        found.setdefault(body.__name__, []).append(one)

        @functools.wraps(body)
        def recorded(*references):
            running[:] = [one]
            one.start(references[len(references) - len(scratch_types) :])
            return body(*references)

        return kernel(recorded, scratch_types=scratch_types, num_threads=num_threads, **options)

    def recorded_copy(source, target, barrier, **options):
        running[0].by[running[0].name(barrier)].add("copies")
        return copy(source, target, barrier, **options)

    def recorded_arrive(barrier):
        running[0].by[running[0].name(barrier)].add("warpgroups")
        return arrive(barrier)

    def recorded_wait(barrier):
        running[0].waited.add(running[0].name(barrier))
        return wait(barrier)

    with pytest.MonkeyPatch.context() as patch, platform.absent_gpu():
        patch.setattr(plgpu, "kernel", recorded_kernel)
        patch.setattr(plgpu, "copy_gmem_to_smem", recorded_copy)
        patch.setattr(plgpu, "barrier_arrive", recorded_arrive)
        patch.setattr(plgpu, "barrier_wait", recorded_wait)
        trace_all()
    return found


def trace_all() -> None:
    def trace(function, *arrays, backward: bool = True):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

        def run(*arrays):
            outputs, vjp = jax.vjp(function, *arrays)
            return vjp(jax.tree.map(jnp.ones_like, outputs))

        jax.eval_shape(run if backward else function, *shapes)

    for case, options in STICK.values():
        attend = functools.partial(stick_breaking_attention, **case.options(), **options, implementation="mosaic")
        trace(attend, *case.arrays("bfloat16"), backward=case.T > 1)
    for T, activation in EXPERTS.values():
        x, w_in, w_out = (jnp.zeros(s, jnp.bfloat16) for s in ((T, 64), (2, 64, 256), (2, 128, 64)))
        indices, gates = jnp.zeros((T, 1), jnp.int32), jnp.ones((T, 1), jnp.bfloat16)
        w_in = w_in if activation == "swiglu" else w_in[..., :128]

        def mlp(x, w_in, w_out, gates, indices=indices, activation=activation):
            options = {"activation": activation, "implementation": "mosaic"}
            return expert_mlp(x, w_in, w_out, route(indices, 2), gates, **options)

        trace(mlp, x, w_in, w_out, gates)
        trace(lambda x, w, i=indices: expert_linear(x, w, route(i, 2), implementation="mosaic"), x, w_in)


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """Return the barrier tables of a page in Markdown, by the name of the kernel in the heading above the table.

    A table is a list of rows. A row is a dict from the name of the column to the text of the cell.
    """
    found = {}
    for section in re.split(r"^##+ ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        rows = [row for row in rows if len(row) == 8]  # other tables have fewer columns
        if rows:
            columns, _, *rows = rows
            for kernel in re.findall(r"`(\w+)`", heading):
                found[kernel] = [dict(zip(columns, row, strict=True)) for row in rows]
    return found


ON_A_PAGE = {kernel: rows for page in PAGES for kernel, rows in tables(page.read_text()).items()}


def test_every_kernel_is_on_a_page(traced):
    assert traced.keys() == ON_A_PAGE.keys()


@pytest.mark.parametrize("kernel", ON_A_PAGE)
def test_the_tables_are_what_the_kernels_declare(traced, kernel):
    seen = set()
    for one in traced[kernel]:

        def value(cell, sizes=one.sizes):
            return eval(cell.strip("`"), {}, sizes)  # the cell is a sum of letters and numbers

        rows = {row["barrier"].strip("`"): row for row in ON_A_PAGE[kernel]}
        written = {name: Barrier(value(row["number"]), value(row["arrivals"])) for name, row in rows.items()}
        assert written == one.barriers, f"{kernel} with {one.sizes}"
        assert one.waited == rows.keys()
        seen.add(one.sizes["W"])
    assert seen == ({2} if kernel == "expert_d_weights" else {1, 2})


@pytest.mark.parametrize("kernel", ON_A_PAGE)
def test_the_tables_say_who_arrives(traced, kernel):
    for row in ON_A_PAGE[kernel]:
        by = set().union(*(one.by[row["barrier"].strip("`")] for one in traced[kernel]))
        assert row["arrivals by"] == ("both" if len(by) == 2 else "".join(by)), row["barrier"]


# The pages' statements on warpgroup barriers and arrivals, compared with the kept PTX of small kernels.

KEPT = sorted(path.stem for path in kept.FOLDER.glob("*.ptx"))
OPERATION = re.compile(
    r"bar\.sync|fence\.proxy\.async|cp\.async\.bulk\.tensor\.\dd\.shared|cp\.async\.bulk\.wait_group|stmatrix"
)


@pytest.mark.parametrize("name", KEPT)
def test_each_thread_of_a_warpgroup_arrives_once(name):
    program = kept.load(name)
    values = dict(re.findall(r"mov\.b32\s+%(r\d+), (\d+);", program.ptx))
    counts = [int(values[register]) for register in re.findall(r"mbarrier\.init.*%(r\d+);", program.ptx)]
    sizes = {"W": program.block[0] // 128 - 1, "accumulators": 2}  # the kept layer is gated
    arrivals = {row["barrier"].strip("`"): eval(row["arrivals"].strip("`"), {}, sizes) for row in ON_A_PAGE[name]}
    assert counts == [128 * arrivals[re.sub(r".*\.|\[.*", "", barrier)] for barrier in program.barriers]


@pytest.mark.parametrize("name", KEPT)
def test_the_compiler_adds_the_barriers_that_the_pages_name(name):
    ptx = kept.load(name).ptx
    assert re.findall(r"bar\.sync\s+(?:%r\d+, )?(\d+);", ptx)[:3] == ["0", "0", "128"]
    found = OPERATION.findall(ptx)
    for before, operation, after in zip(found, found[1:], found[2:], strict=False):
        if operation in ("fence.proxy.async", "cp.async.bulk.wait_group"):
            assert after == "bar.sync", operation
        if operation.startswith("cp.async.bulk.tensor"):
            assert before == "bar.sync", operation
        if operation == "stmatrix":
            assert {before, after} <= {"bar.sync", "stmatrix"}
    assert found.count("fence.proxy.async") >= 1 and found.count("stmatrix") >= 2
