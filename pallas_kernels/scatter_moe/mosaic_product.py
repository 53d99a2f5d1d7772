"""The kernels that multiply rows by the weights of their experts on Hopper GPUs (Pallas Mosaic GPU).

The rows are sorted by expert and cut into tiles (`Tasks`). For row i of the tiles, whose expert is e, the kernels
compute out[target[i]] = x[source[i]] @ weight[e]. So they can read and write rows in any order: by token, by pair or
sorted by expert. A block computes tile after tile. One or two warpgroups each multiply 64 rows of a tile, with one or
two accumulators [64, 128] in registers. Another warpgroup copies rows of x to shared memory, and the copy engine copies
weights. Then an activation or its derivative is applied. docs/design/expert_kernels.md explains the barriers.
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

ROWS = 64  # rows of a tile that one warpgroup multiplies
COLUMNS = 128  # columns of an accumulator
HALF = COLUMNS // 2
DEPTH = 64  # the size of a step along the dimension that is summed


class Plan(NamedTuple):
    """The static sizes of one launch of a kernel, for x [x_parts, rows, width] and a result [parts, rows, columns].

    A row of x or of the result has two parts for the halves of a gated hidden layer, else one. In x, it has six parts
    for the six bfloat16 products that a float32 product is made of.
    """

    x_parts: int
    width: int  # columns of a part of x
    columns: int  # columns of a part of the result
    parts: int  # the number of parts of the result
    dtype: jnp.dtype
    warpgroups: int  # the number of warpgroups of a block that multiply
    transposed: bool = False  # weight [E, columns, width]
    first: int = 0  # the column of the weight for the first column of the result
    out_dtype: jnp.dtype | None = None  # the type of the result of `product`; None: dtype

    @property
    def rows(self) -> int:
        """The number of rows of one tile of the result: 64 for each multiplying warpgroup."""
        return ROWS * self.warpgroups

    @property
    def steps_of_part(self) -> int:
        """The number of steps of the matrix product for one part of x. A step multiplies 64 columns of x."""
        return -(-self.width // DEPTH)


class Kind(NamedTuple):
    """One of the kernels `product`, `activated` and `d_activated`, which differ in what follows the matrix product.

    `finish`: `finish(at, accumulators, inputs, outputs, scratch)` runs in every multiplying warpgroup after the product
      of a tile. It reads the sums in `accumulators` and the arrays `inputs`, and writes `outputs` in global memory.
    `per_tile`: how many accumulators [64, 128] a warpgroup has. Accumulator p begins at column at.column + p * apart.
    `prefetch`: `prefetch(tile, inputs, scratch)` runs in the copying warpgroup. It starts to copy rows of `inputs` to
      shared memory for `finish`, and returns the barrier at which the warpgroup arrives when they are there.
    """

    name: str
    finish: Callable
    per_tile: int
    apart: int
    prefetch: Callable | None = None

    @property
    def step(self) -> int:
        """The number of columns of a tile of the result: 256 in `product`, and 128 in the other kernels."""
        return self.per_tile * COLUMNS if self.apart == COLUMNS else COLUMNS


class Operands(NamedTuple):
    """References to the arrays in global memory that every kernel reads: x, the weights and the list of tiles."""

    x: Any  # [parts, rows, width]
    source: Any  # [tiles * rows]: for every row of the tiles, the index of its row in x
    expert: Any  # [tiles]: the expert of every tile of rows
    count: Any  # [1]: the number of tiles in use
    weight: Any  # [E, parts * width, F] or transposed
    inputs: Any  # the arrays that `finish` reads


class Tile(NamedTuple):
    """One tile of the result, which a block computes: a tile of rows, all of one expert, and a range of columns."""

    i: jax.Array  # the index of this piece among the pieces of the block
    number: jax.Array  # the index of the tile of rows
    column: jax.Array  # the first column of the result
    expert: jax.Array
    steps: jax.Array  # the number of steps of the matrix product


class At(NamedTuple):
    """The part of the result in the accumulators of one warpgroup: 64 rows of one expert, from column `column` on."""

    wg: jax.Array  # the index of the warpgroup
    rows: pl.Slice  # the indices of the 64 rows, counted over the rows of all tiles
    expert: jax.Array
    column: jax.Array  # the first column of the result


class Steps(NamedTuple):
    """Shared memory of a block for rows of x and weights of STAGES steps of the matrix product, and its barriers."""

    x: Any  # [STAGES, W, ROWS, DEPTH]
    weights: tuple  # for every accumulator: [STAGES, DEPTH, COLUMNS] or transposed
    ring: Ring


class Finish(NamedTuple):
    """Arrays in global memory that the kernels `product` and `activated` read after the matrix product of a tile."""

    rows: Any  # [tiles * rows]: for every row of the tiles, the index of its row in the result
    bias: Any  # [E + 1, parts, columns padded to a multiple of 256], or None; bias[E] is 0, for rows without an expert


class Activated(NamedTuple):
    """The results of the kernel `activated`, sorted by expert: act(h) and, with `keep`, the pre-activation h."""

    activated: Any  # [R, F]
    hidden: Any  # [parts, R, F], or None


class Derivative(NamedTuple):
    """Arrays in global memory that the kernel `d_activated` reads after the matrix product. h is the pre-activation."""

    rows: Any  # [tiles * rows]: for every row of the tiles, the index of its row in h and in the results
    hidden: Any  # [parts, R, F]: h
    gates: Any  # [tiles * rows]: the gate of every row of the tiles


class Derivatives(NamedTuple):
    """The results of the kernel `d_activated`. `gate` is the router's weight of a row, and h is its pre-activation."""

    d_hidden: Any  # [parts, R, F]: the gradient of h
    gated: Any  # [R, F]: gate * act(h)
    d_gate: Any  # [tiles of columns, tiles * rows]: its sum over the first axis is the gradient of the gates


class DerivativeScratch(NamedTuple):
    """Shared memory of `d_activated` for rows of the pre-activation h and of gate * act(h), and two barriers."""

    hidden: Any  # [parts, W, ROWS, COLUMNS]: h, which is then overwritten by its gradient
    gated: Any  # [W, ROWS, COLUMNS]: gate * act(h), before it is copied to global memory
    arrived: Any  # barrier: the rows of h for this tile have arrived in `hidden`
    free: Any  # barrier: every multiplying warpgroup is done with `hidden`


def _product(plan: Plan, kind: Kind, x, source, weight, tasks: Tasks, inputs, out_type, scratch):
    """Launch the kernel `kind` and return its results, a pytree of arrays like `out_type`.

    For row i of the tiles in `tasks`, whose expert is e, the kernel multiplies row source[i] of x by weight[e]. From
    this and from `inputs`, `kind.finish` computes the results, with the memory and barriers of `scratch`. x is
    [parts, rows, width]. The weight is [E, parts * width, F], or [E, F, parts * width] if `plan.transposed`.
    """
    W, E = plan.warpgroups, weight.shape[0]
    across = -(-plan.columns // kind.step)
    blocks = pipeline.blocks(tasks.expert.shape[0] * across)

    def kernel(operands: Operands, outputs, steps_mem: Steps, own):
        wg = lax.axis_index("wg")

        def for_each_tile(body, state):
            def one(i, number, state):
                tile, column = number // across, number % across * kind.step
                e = operands.expert[tile]
                steps = jnp.where(e < E, plan.x_parts * plan.steps_of_part, 0)  # none for rows without an expert
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
    products = 1 if plan.transposed else plan.parts  # each one is [rows, columns]
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
    """In the copying warpgroup, copy rows of x and weights from global to shared memory, 64 columns of x per step.

    `for_each_tile(body, state)` calls `state = body(tile, state)` for each tile of the block. `steps_mem` is the
    target. `own` has the shared memory and the barriers for `kind.prefetch`.
    """
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
            # `prefetch` waits until the previous tile is finished. So first hand over all steps of the previous tile.
            sent = pipeline.hand_over(ring, sent, before=before.started)
            arrived = kind.prefetch(tile, operands.inputs, own)
            sent = pipeline.hand_over(ring, sent)
            row_copies.gather_wait(0)
            plgpu.barrier_arrive(arrived)
        return sent

    pipeline.hand_over(ring, for_each_tile(copy_tile, pipeline.nothing_sent()))


def _multiply(plan: Plan, kind: Kind, wg, operands: Operands, outputs, steps_mem: Steps, own,
              for_each_tile: Callable) -> None:  # fmt: skip
    """In multiplying warpgroup `wg`, multiply 64 rows of each tile by weights, and pass the sums to `kind.finish`."""

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
    """Write `values` [64, 128] from registers to the rows `numbers` [64] of `out_ref` [R, F], from column `column` on.

    `out_ref` is in global memory. The values pass through `memory`, shared memory for 64 rows and 128 or 64 columns.
    """
    at_once = memory.shape[1]
    for first in range(0, COLUMNS, at_once):
        memory[...] = values[:, first : first + at_once].astype(memory.dtype)
        plgpu.commit_smem()
        row_copies.scatter(memory, numbers, column + first, out_ref)
        plgpu.commit_smem()


def _biased(accumulator, bias_ref, part, at):
    """Return the accumulator [64, 128] in registers plus 128 columns of bias_ref[at.expert, part] from at.column on."""
    bias = plgpu.load(bias_ref.at[at.expert, part, pl.ds(at.column, COLUMNS)], layout=shims.COLUMN, optimized=False)
    return accumulator + lax.broadcast_in_dim(bias, accumulator.shape, [1])


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """Multiply rows of x by the weights of their experts. Return `out` [rows, columns].

    For row i of the tiles in `tasks`, whose expert is e, out[target[i]] = (row source[i] of x) @ weight[e] + bias[e].
    Other rows of `out` are not written. x is [parts, rows of x, width]: row r of x is the parts x[:, r], joined to one
    row. The weight is [E, parts * width, F], or [E, F, parts * width] if `plan.transposed`. The bias is [E + 1, 1, C]:
    the columns are padded to C, a multiple of 256. bias[E] is zero, for rows without an expert, for which e is E.
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
    """Compute the hidden layer of `expert_mlp`. Return (act(h) [R, F],), or (act(h), h [parts, R, F]) if `keep`.

    For row i of the tiles in `tasks`, whose expert is e, h = x[source[i]] @ weight[e] + bias[e]. The rows of both
    results are sorted by expert. For a gated activation, the two parts of h are its two halves.
    """
    R, P = tasks.num_pairs, plan.parts

    def finish(at, accumulators, inputs: Finish, outputs: Activated, out_mem):
        numbers, own_mem = inputs.rows.at[at.rows], out_mem.at[at.wg]
        halves = []
        for p, h in enumerate(accumulators):
            if inputs.bias is not None:
                plgpu.commit_smem()  # keeps the compiler from loading all biases at once, which do not fit
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
    """Compute the backward pass of gate * act(h) @ weight[e], the output of one expert in `expert_mlp`.

    `hidden` is the pre-activation h, sorted by expert. For row i of the tiles in `tasks`, of token source[i], the
    cotangent of gates[i] * act(h) is dy = d_out[source[i]] @ weight[e]^T. Return (dh, gated, d_gate):

    `dh` [parts, R, F]: the gradient of h, gate * dy times the derivative of act.
    `gated` [R, F]: gate * act(h), which the caller multiplies by d_out for the gradient of the weight.
    `d_gate`: [tiles of columns, tiles * rows]. Its sum over the first axis is <act(h), dy>, the gradient of the gates.
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

        def halves():  # one half of the columns after the other: both at once would not fit into the registers
            for first in range(0, COLUMNS, HALF):
                parts = [own.hidden.at[p, at.wg, :, pl.ds(first, HALF)] for p in range(P)]
                h = [plgpu.load(x, layout=shims.TILE) for x in parts]
                plgpu.commit_smem()  # all threads have read the values that are overwritten next
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
