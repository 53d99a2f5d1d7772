"""Products of rows with the weights of their expert on Hopper GPUs (Pallas Mosaic GPU).

out[target[r]] = x[source[r]] @ weight[expert of r], where both row numbers come from `tasks`: all four cases of sorted
and scattered rows are one kernel. A block takes one tile after the other. In each tile one or two warpgroups multiply
64 rows each, with one or two accumulators of 64 x 128. Another warpgroup copies ahead of them: rows by their numbers,
weights by the copy engine. What follows the product (an activation, its derivative) runs on the accumulators.
docs/kernels/scatter_moe.md explains the barriers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_pipeline
from .. import mosaic_row_copies as row_copies
from .. import mosaic_shims as shims
from ..mosaic_pipeline import Ring
from . import mosaic_row_pipeline as pipeline
from .call import activate, d_activate
from .mosaic_row_pipeline import STAGES, memory
from .tasks import Tasks

ROWS = 64  # rows of a warpgroup
COLUMNS = 128  # columns of an accumulator
HALF = COLUMNS // 2
DEPTH = 64  # how much of the dimension that is summed a step takes


class Plan(NamedTuple):
    """Static sizes of one call of a kernel.

    A row of x or of the result may lie in several arrays of the same width, its parts: the halves of a gated layer.
    """

    x_parts: int
    width: int  # columns of a part of x
    columns: int  # columns of a part of the result
    parts: int  # of the result
    dtype: jnp.dtype
    warpgroups: int
    transposed: bool = False  # weight [E, columns, width]
    first: int = 0  # the column of the weight that makes the first column of the result
    out_dtype: jnp.dtype | None = None  # the type of the result of `product`; None: dtype

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return ROWS * self.warpgroups

    @property
    def steps_of_part(self) -> int:
        return -(-self.width // DEPTH)


class Kind(NamedTuple):
    """What is different in `product`, `activated` and `d_activated`.

    `finish(At, accumulators, inputs, outputs, scratch)` gets the result of a tile. Its last three arguments are pytrees
    of references. A tile has `per_tile` accumulators, whose first columns lie `apart`. `prefetch(tile, inputs,
    scratch)` starts to copy more rows for a tile after its steps, and returns the barrier to arrive at when they have
    arrived.
    """

    name: str
    finish: Callable
    per_tile: int
    apart: int
    prefetch: Callable | None = None

    @property
    def step(self) -> int:
        """Columns of each part of the result that the accumulators of a tile hold together."""
        return self.per_tile * COLUMNS if self.apart == COLUMNS else COLUMNS


class Operands(NamedTuple):
    """References to what every kernel reads."""

    x: Any  # [parts, rows, width]
    source: Any  # [tiles * rows]: the row of x for every row of a tile
    expert: Any  # [tiles]
    count: Any  # [1]: tiles in use
    weight: Any  # [E, parts * width, F] or transposed
    inputs: Any  # what `finish` needs besides


class Tile(NamedTuple):
    """One tile of rows times one tile of columns, which is a piece of work of a block."""

    i: jax.Array  # of the block's pieces
    number: jax.Array  # of the tile of rows
    column: jax.Array  # of the result, the first
    expert: jax.Array
    steps: jax.Array


class At(NamedTuple):
    """Which part of the result the accumulators of a warpgroup hold."""

    wg: jax.Array  # the warpgroup
    rows: pl.Slice  # 64 of the rows of all tiles
    expert: jax.Array
    column: jax.Array  # of the result, the first


class Steps(NamedTuple):
    """Shared memory of the steps of a block, and its barriers."""

    x: Any  # [STAGES, W, ROWS, DEPTH]
    weights: tuple  # of every accumulator, [STAGES, DEPTH, COLUMNS] or transposed
    ring: Ring


class Finish(NamedTuple):
    """What `product` and `activated` need after the product."""

    rows: Any  # [tiles * rows]: the row of the result for every row of a tile
    bias: Any  # [E + 1, parts, columns padded], or None


class Activated(NamedTuple):
    """The results of `activated`."""

    activated: Any  # [R, F]
    hidden: Any  # [parts, R, F], or None


class Derivative(NamedTuple):
    """What `d_activated` needs after the product."""

    rows: Any  # [tiles * rows]: the sorted row of every row of a tile
    hidden: Any  # [parts, R, F]
    gates: Any  # [tiles * rows]


class Derivatives(NamedTuple):
    """The results of `d_activated`."""

    d_hidden: Any  # [parts, R, F]
    gated: Any  # [R, F]
    d_gate: Any  # [tiles of columns, tiles * rows]


class DerivativeScratch(NamedTuple):
    """Shared memory of `d_activated` beyond the steps, and two more barriers."""

    hidden: Any  # [parts, W, ROWS, COLUMNS]; its derivative takes its place
    gated: Any  # [W, ROWS, COLUMNS], on its way out
    arrived: Any  # `hidden` holds the hidden rows of this tile
    free: Any  # every multiplying warpgroup is done with `hidden`


def _product(
    plan: Plan, kind: Kind, x, source, weight, tasks: Tasks, inputs, out_type, scratch
):  # fmt: skip
    """Launch a kernel. `inputs`, `out_type` and `scratch` are what `kind.finish` gets references of."""
    W, E = plan.warpgroups, weight.shape[0]
    across = -(-plan.columns // kind.step)
    blocks = pipeline.blocks(tasks.expert.shape[0] * across)

    def kernel(operands: Operands, outputs, steps_mem: Steps, own):
        wg = lax.axis_index("wg")

        def for_each_tile(body, state):
            def one(i, number, state):
                tile, column = number // across, number % across * kind.step
                e = operands.expert[tile]
                # A tile of rows without an expert has no steps.
                steps = jnp.where(e < E, plan.x_parts * plan.steps_of_part, 0)
                return body(Tile(i, tile, column, e, steps), state)

            return pipeline.every(blocks, operands.count[0] * across, one, state)

        pl.when(wg == W)(partial(_copy, plan, kind, operands, steps_mem, own, for_each_tile))
        pl.when(wg < W)(partial(_multiply, plan, kind, wg, operands, outputs, steps_mem, own, for_each_tile))

    w_shape = (STAGES, COLUMNS, DEPTH) if plan.transposed else (STAGES, DEPTH, COLUMNS)
    steps_mem = Steps(
        x=memory((STAGES, W, ROWS, DEPTH), plan.dtype),
        weights=(memory(w_shape, plan.dtype),) * kind.per_tile,
        ring=pipeline.ring(warpgroups=W, copies=kind.per_tile),
    )
    products = 1 if plan.transposed else plan.parts  # of [rows, columns] each
    run = mosaic_pipeline.run(
        kernel,
        name=kind.name,
        flops=2 * tasks.num_pairs * plan.x_parts * plan.width * plan.columns * products,
        blocks=blocks,
        warpgroups=W + 1,
        out_type=out_type,
        scratch=(steps_mem, scratch),
    )
    return run(Operands(x, source, tasks.expert, tasks.count, weight, inputs))


def _copy(plan: Plan, kind: Kind, operands: Operands, steps_mem: Steps, own, for_each_tile: Callable) -> None:
    """The warpgroup that copies the rows and weights of every step."""
    ring, per_part = steps_mem.ring, plan.steps_of_part

    def copy_tile(tile: Tile, before):
        def load(s, stage):
            part, depth = s // per_part, s % per_part * DEPTH
            for w in range(plan.warpgroups):
                rows = operands.source.at[pl.ds(tile.number * plan.rows + w * ROWS, ROWS)]
                row_copies.gather(operands.x.at[part], rows, depth, steps_mem.x.at[stage, w])
            for p, w_mem in enumerate(steps_mem.weights):
                inner = pl.ds(part * plan.width + depth, DEPTH)
                outer = pl.ds(plan.first + tile.column + p * kind.apart, COLUMNS)
                at = (tile.expert, outer, inner) if plan.transposed else (tile.expert, inner, outer)
                plgpu.copy_gmem_to_smem(operands.weight.at[at], w_mem.at[stage], ring.full.at[stage])

        sent = pipeline.send(ring, tile.steps, load, before)
        if kind.prefetch is not None:
            # `prefetch` waits until the tile before is finished, which needs all of that tile's steps.
            sent = pipeline.hand_over(ring, sent, before=before.started)
            arrived = kind.prefetch(tile, operands.inputs, own)
            sent = pipeline.hand_over(ring, sent)
            row_copies.gather_wait(0)
            plgpu.barrier_arrive(arrived)
        return sent

    pipeline.hand_over(ring, for_each_tile(copy_tile, pipeline.nothing_sent()))


def _multiply(
    plan: Plan, kind: Kind, wg, operands: Operands, outputs, steps_mem: Steps, own, for_each_tile: Callable
) -> None:  # fmt: skip
    """A warpgroup that multiplies 64 rows of every tile, and finishes their result."""

    def multiply_tile(tile: Tile, step):
        def multiply(stage, accumulators):
            for acc, w_mem in zip(accumulators, steps_mem.weights, strict=True):
                w = w_mem.at[stage]
                w = w.transpose((1, 0)) if plan.transposed else w
                plgpu.wgmma(acc, steps_mem.x.at[stage, wg], w)

        next_step, accumulators = pipeline.accumulate(
            steps_mem.ring, tile.steps, multiply, (ROWS, COLUMNS), kind.per_tile, step
        )
        at = At(wg, pl.ds(tile.number * plan.rows + wg * ROWS, ROWS), tile.expert, tile.column)
        kind.finish(at, accumulators, operands.inputs, outputs, own)
        return next_step

    for_each_tile(multiply_tile, jnp.int32(0))


def _store(values, numbers, memory, column, out_ref) -> None:
    """Write values [64, 128] as rows of an array, by their numbers.

    They pass through `memory`, which has room for all of their columns or for half of them.
    """
    at_once = memory.shape[1]
    for first in range(0, COLUMNS, at_once):
        memory[...] = values[:, first : first + at_once].astype(memory.dtype)
        plgpu.commit_smem()
        row_copies.scatter(memory, numbers, column + first, out_ref)
        plgpu.commit_smem()


def _biased(accumulator, bias_ref, part, at):
    bias = plgpu.load(bias_ref.at[at.expert, part, pl.ds(at.column, COLUMNS)], layout=shims.COLUMN, optimized=False)
    return accumulator + lax.broadcast_in_dim(bias, accumulator.shape, [1])


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """[rows, columns]: the products in the rows `target`; other rows are not written.

    x [parts, rows, width]; weight [E, parts * width, F] or transposed; bias [E + 1, parts, columns padded], zero for
    rows without an expert.
    """

    def finish(at, accumulators, inputs: Finish, out_ref, out_mem):
        for p, acc in enumerate(accumulators):
            at = at._replace(column=at.column + p * COLUMNS)
            y = acc if inputs.bias is None else _biased(acc, inputs.bias, 0, at)
            _store(y, inputs.rows.at[at.rows], out_mem.at[at.wg], at.column, out_ref)

    dtype = plan.out_dtype or plan.dtype
    kind = Kind("expert_product", finish, per_tile=2, apart=COLUMNS)
    out_type = jax.ShapeDtypeStruct((rows, plan.columns), dtype)
    out_mem = memory((plan.warpgroups, ROWS, COLUMNS * 2 // dtype.itemsize), dtype)
    return _product(plan, kind, x, source, weight, tasks, Finish(target, bias), out_type, out_mem)


def activated(plan: Plan, activation: str, x, source, weight, tasks: Tasks, bias=None, *, keep: bool):
    """(act(h) [R, F], h [parts, R, F] if `keep`) of h = x @ weight + bias, in sorted rows."""
    R, P = tasks.num_pairs, plan.parts

    def finish(at, accumulators, inputs: Finish, outputs: Activated, out_mem):
        numbers, own_mem = inputs.rows.at[at.rows], out_mem.at[at.wg]
        halves = []
        for p, h in enumerate(accumulators):
            if inputs.bias is not None:
                plgpu.commit_smem()  # keeps the compiler from loading all biases at once: they would not fit
                h = _biased(h, inputs.bias, p, at)
            if keep:
                _store(h, numbers, own_mem, at.column, outputs.hidden.at[p])
            halves.append(h)
        _store(activate(activation, *halves), numbers, own_mem, at.column, outputs.activated)

    out_type = Activated(
        activated=jax.ShapeDtypeStruct((R, plan.columns), plan.dtype),
        hidden=jax.ShapeDtypeStruct((P, R, plan.columns), plan.dtype) if keep else None,
    )
    kind = Kind("expert_activated", finish, per_tile=P, apart=plan.columns)
    out_mem = memory((plan.warpgroups, ROWS, COLUMNS), plan.dtype)
    out = _product(plan, kind, x, source, weight, tasks, Finish(tasks.sorted, bias), out_type, out_mem)
    return out if keep else out[:1]


def d_activated(plan: Plan, activation: str, d_out, source, weight, tasks: Tasks, hidden, gates):
    """The derivative of the sum of gate * act(h) @ weight: (dh [parts, R, F], gate * act(h) [R, F], d_gate).

    `gates` [tiles * rows] in fp32. `d_gate` [tiles of columns, tiles * rows] has <act(h), dy> of every row of the
    tiles, where dy = d_out @ weight^T, one sum for each tile of columns.
    """
    R, (P, _, F) = tasks.num_pairs, hidden.shape
    W, dtype = plan.warpgroups, plan.dtype

    def prefetch(tile: Tile, inputs: Derivative, own: DerivativeScratch):
        @pl.when(tile.i > 0)
        def _():
            plgpu.barrier_wait(own.free)

        for w in range(W):
            numbers = inputs.rows.at[pl.ds(tile.number * plan.rows + w * ROWS, ROWS)]
            for p in range(P):
                row_copies.gather(inputs.hidden.at[p], numbers, tile.column, own.hidden.at[p, w])
        row_copies.gather_commit()
        return own.arrived

    def finish(at, accumulators, inputs: Derivative, outputs: Derivatives, own: DerivativeScratch):
        numbers, (acc,) = inputs.rows.at[at.rows], accumulators
        gate = plgpu.load(inputs.gates.at[at.rows], layout=shims.ROW, optimized=False)
        gate = lax.broadcast_in_dim(gate, (ROWS, HALF), [0])
        plgpu.barrier_wait(own.arrived)
        d_gate = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW)

        # In two passes, and in halves: everything at once would not fit the registers.
        def halves():
            for first in range(0, COLUMNS, HALF):
                parts = [own.hidden.at[p, at.wg, :, pl.ds(first, HALF)] for p in range(P)]
                h = [plgpu.load(x, layout=shims.TILE) for x in parts]
                plgpu.commit_smem()  # all have read what is overwritten next
                yield slice(first, first + HALF), parts, [x.astype(jnp.float32) for x in h]

        for columns, _, h in halves():
            a = activate(activation, *h)
            d_gate += (a * acc[:, columns]).sum(1)
            own.gated[at.wg, :, columns] = (a * gate).astype(dtype)
        outputs.d_gate[at.column // COLUMNS, at.rows] = d_gate
        for columns, parts, h in halves():
            for x, dh in zip(parts, d_activate(activation, acc[:, columns] * gate, *h), strict=True):
                x[...] = dh.astype(dtype)
        plgpu.commit_smem()
        row_copies.scatter(own.gated.at[at.wg], numbers, at.column, outputs.gated)
        for p in range(P):
            row_copies.scatter(own.hidden.at[p, at.wg], numbers, at.column, outputs.d_hidden.at[p])
        plgpu.commit_smem()
        plgpu.barrier_arrive(own.free)

    kind = Kind("expert_d_activated", finish, per_tile=1, apart=COLUMNS, prefetch=prefetch)
    return _product(
        plan, kind, d_out, source, weight, tasks, Derivative(tasks.sorted, hidden, gates),
        Derivatives(
            d_hidden=jax.ShapeDtypeStruct(hidden.shape, dtype),
            gated=jax.ShapeDtypeStruct((R, F), dtype),
            d_gate=jax.ShapeDtypeStruct((-(-F // COLUMNS), gates.shape[0]), jnp.float32),
        ),
        DerivativeScratch(
            hidden=memory((P, W, ROWS, COLUMNS), dtype),
            gated=memory((W, ROWS, COLUMNS), dtype),
            arrived=plgpu.Barrier(),
            free=plgpu.Barrier(num_arrivals=W),
        ),
    )  # fmt: skip
