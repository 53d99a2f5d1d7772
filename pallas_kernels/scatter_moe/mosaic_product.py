"""The kernels that multiply rows by the weights of their experts on Hopper GPUs (Pallas Mosaic GPU).

The (token, choice) pairs are sorted by expert and cut into tiles of rows (`Tasks`). All rows of a tile belong to one
expert. For row i of the tiles, whose expert is e, a kernel computes out[target[i]] = x[source[i]] @ weight[e]. So the
rows of x and of the result can be in any order: by token, by pair or sorted by expert. There are three kernels:
`product`, `activated`, which also applies the activation, and `d_activated`, which also applies the derivative of the
activation.

A tile of the result is a tile of rows times a range of 128 or 256 columns. A block computes tile after tile of the
result. The matrix product of a tile runs in steps. Each step multiplies 64 columns of x by 64 rows of the weight. The
operands of a step are in one of STAGES pipeline stages in shared memory (`mosaic_row_pipeline`).

A block has W multiplying warpgroups (one or two) and one copying warpgroup. Each multiplying warpgroup computes 64 rows
of a tile, with one or two accumulators [64, 128] in registers. The copying warpgroup copies rows of x to shared memory,
and starts the copy engine, which copies weights. docs/design/expert_kernels.md explains the barriers.

For a gated activation, a row of the pre-activation h has two parts, the two halves of the hidden layer. For any other
activation, it has one part. R is the number of (token, choice) pairs.
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
from .mosaic_product_plan import COLUMNS, DEPTH, HALF, ROWS, Kind, Plan
from .mosaic_row_pipeline import STAGES, memory
from .tasks import Tasks


class Operands(NamedTuple):
    """References to the arrays in global memory that a kernel reads."""

    x: Any  # [x_parts, rows of x, width]
    source: Any  # [tiles * rows of a tile]: for every row of the tiles, the index of its row in x, or -1 if it is empty
    expert: Any  # [tiles]: the expert of every tile of rows
    count: Any  # [1]: the number of tiles of rows in use
    weight: Any  # [E, x_parts * width, F], or [E, F, x_parts * width] if `Plan.transposed`
    inputs: Any  # a `Finish` or a `Derivative`: the arrays that `Kind.finish` reads


class Tile(NamedTuple):
    """A tile of the result that a block computes: a tile of rows, all of one expert, times a range of columns."""

    i: jax.Array  # the index of this tile of the result among the tiles that the block computes
    number: jax.Array  # the index of the tile of rows in `Tasks`
    column: jax.Array  # the first column of the range
    expert: jax.Array
    steps: jax.Array  # the number of steps of the matrix product


class At(NamedTuple):
    """The rows and columns of the result that one warpgroup computes: 64 rows, and the columns from `column` on."""

    wg: jax.Array  # the index of the warpgroup
    rows: pl.Slice  # the numbers of the 64 rows, if the rows of all tiles are numbered 0, 1, and so on
    expert: jax.Array
    column: jax.Array


class Steps(NamedTuple):
    """Shared memory for the operands of STAGES steps of the matrix product, and the barriers of the stages."""

    x: Any  # [STAGES, W, ROWS, DEPTH]: for every multiplying warpgroup, 64 columns of its 64 rows of x
    weights: tuple  # for every accumulator: [STAGES, DEPTH, COLUMNS], or [STAGES, COLUMNS, DEPTH] if `Plan.transposed`
    ring: Ring


class Finish(NamedTuple):
    """Arrays in global memory that the kernels `product` and `activated` read after the matrix product of a tile."""

    rows: Any  # [tiles * rows of a tile]: for every row of the tiles, the index of its row in the result, or -1
    bias: Any  # [E + 1, parts, columns padded to a multiple of 256], or None; bias[E] is 0, for rows without an expert


class Activated(NamedTuple):
    """The results of the kernel `activated`, sorted by expert: act(h) and, with `keep`, the pre-activation h."""

    activated: Any  # [R, F]
    hidden: Any  # [parts, R, F], or None


class Derivative(NamedTuple):
    """Arrays in global memory that the kernel `d_activated` reads after the matrix product of a tile.

    h is the pre-activation of the hidden layer act(h), and dh is the gradient of h.
    """

    rows: Any  # [tiles * rows of a tile]: for every row of the tiles, the index of its row in h and in dh, or -1
    hidden: Any  # [parts, R, F]: h
    gates: Any  # [tiles * rows of a tile]: the gate of every row of the tiles


class Derivatives(NamedTuple):
    """The results of the kernel `d_activated`, which is a part of the backward pass.

    In the forward pass, a row with expert e has the output gate * (act(h) @ weight[e]). Here `gate` is the router's
    weight for the row, and h is the pre-activation of the row.
    """

    d_hidden: Any  # [parts, R, F]: dh, the gradient of h
    gated: Any  # [R, F]: gate * act(h)
    d_gate: Any  # [ranges of 128 columns, tiles * rows of a tile]: terms of <act(h), dy> of every row (`d_activated`)


class DerivativeScratch(NamedTuple):
    """Shared memory of `d_activated` for rows of the pre-activation h and of gate * act(h), and two barriers."""

    hidden: Any  # [parts, W, ROWS, COLUMNS]: h, which the kernel then overwrites with the gradient of h
    gated: Any  # [W, ROWS, COLUMNS]: gate * act(h), before it is copied to global memory
    arrived: Any  # barrier that completes when the rows of h of a tile are in `hidden`
    free: Any  # barrier that completes when every multiplying warpgroup is done with `hidden`


def _product(plan: Plan, kind: Kind, x, source, weight, tasks: Tasks, inputs, out_type, scratch):
    """Launch the kernel `kind` and return its results, a pytree of arrays like `out_type`.

    x is [x_parts, rows of x, width]: x_parts arrays, whose columns stand side by side in the product. So the weight is
    [E, x_parts * width, F], or [E, F, x_parts * width] if `plan.transposed`. For row i of the tiles in `tasks`, whose
    expert is e, the kernel multiplies row source[i] of x by weight[e]. From these products and from the arrays
    `inputs`, `kind.finish` computes the results. `scratch` declares the shared memory and the barriers that
    `kind.finish` and `kind.prefetch` get as their argument `own`.
    """
    W, E = plan.warpgroups, weight.shape[0]
    across = -(-plan.columns // kind.columns_of_tile)
    blocks = pipeline.blocks(tasks.expert.shape[0] * across)

    def kernel(operands: Operands, outputs, steps_mem: Steps, own):
        wg = lax.axis_index("wg")

        def for_each_tile(body, state):
            def one(i, number, state):
                tile, column = number // across, number % across * kind.columns_of_tile
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
    products = 1 if plan.transposed else plan.parts  # `d_activated` computes one product for all parts of its result
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
    """Copy weights and rows of x from global to shared memory. The copying warpgroup runs this.

    Each step copies 64 columns of x and 64 rows of the weight to a stage of `steps_mem`. `kind.prefetch`, if it is
    not None, copies other rows, which `kind.finish` needs (`Kind`). `own` has the shared memory and the barriers for
    these rows. `for_each_tile(body, state)` calls `state = body(tile, state)` for each `Tile` that this block
    computes.
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
            # `prefetch` waits until the multiplying warpgroups have finished the previous tile. They need all steps of
            # that tile, so hand these steps over first.
            sent = pipeline.hand_over(ring, sent, before=before.started)
            arrived = kind.prefetch(tile, operands.inputs, own)
            sent = pipeline.hand_over(ring, sent)
            row_copies.gather_wait(0)
            plgpu.barrier_arrive(arrived)
        return sent

    pipeline.hand_over(ring, for_each_tile(copy_tile, pipeline.nothing_sent()))


def _multiply(plan: Plan, kind: Kind, wg, operands: Operands, outputs, steps_mem: Steps, own,
              for_each_tile: Callable) -> None:  # fmt: skip
    """Multiply 64 rows of each tile by weights, and call `kind.finish`. The multiplying warpgroup `wg` runs this.

    The operands of each step are in a stage of `steps_mem`. The sums are in registers. `own` has the shared memory and
    the barriers for `kind.finish`. `for_each_tile(body, state)` calls `state = body(tile, state)` for each `Tile` that
    this block computes.
    """

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
    """Write row r of `values` [64, 128] to row numbers[r] of `out_ref` [R, F], from column `column` on.

    `values` is in registers. `numbers`, int32 [64], and `out_ref` are references to global memory. If numbers[r] is
    negative, row r is not written. The values pass through `memory`, shared memory of this warpgroup for 64 rows and
    128 or 64 columns.
    """
    at_once = memory.shape[1]
    for first in range(0, COLUMNS, at_once):
        memory[...] = values[:, first : first + at_once].astype(memory.dtype)
        plgpu.commit_smem()
        row_copies.scatter(memory, numbers, column + first, out_ref)
        plgpu.commit_smem()


def _biased(accumulator, bias_ref, part, at):
    """Return `accumulator` [64, 128], which is in registers, plus the bias of its 128 columns.

    The bias is bias_ref[at.expert, part, at.column : at.column + 128]. `bias_ref` is in global memory. `part` is 1 for
    the second half of a gated hidden layer, and 0 otherwise. `at`, an `At`, has the expert and the first column.
    """
    bias = plgpu.load(bias_ref.at[at.expert, part, pl.ds(at.column, COLUMNS)], layout=shims.COLUMN, optimized=False)
    return accumulator + lax.broadcast_in_dim(bias, accumulator.shape, [1])


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """Multiply rows of x by the weights of their experts. Return `out` [rows, columns].

    For row i of the tiles in `tasks`, whose expert is e,

      out[target[i]] = (row source[i] of x) @ weight[e] + bias[e].

    Rows of `out` that are not in `target` are not written. If row i is empty, source[i] and target[i] are -1.

    x is [parts, rows of x, width]: row r of x is the concatenation of its parts, x[0, r], x[1, r], and so on. The
    weight is [E, parts * width, F], or [E, F, parts * width] if `plan.transposed`. `out` has `plan.columns` columns of
    the product, from column `plan.first` on. The bias is None or [E + 1, 1, C], where C is `plan.columns` rounded up to
    a multiple of 256. A row without an expert has e = E. Its product is zero, and bias[E] must be zero.
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
    """Compute the hidden layer of `expert_mlp`. Return (act(h),), or (act(h), h) if `keep`.

    Row i of the tiles in `tasks` belongs to one expert e. For this row, the pre-activation h is

      x[0, source[i]] @ weight[e] + bias[e].

    x is [1, rows of x, D], and the weight is [E, D, parts * F]. `parts` is 2 for a gated activation (the two halves of
    the hidden layer), and 1 for any other. The bias is None or [E + 1, parts, F padded to a multiple of 256]. act(h) is
    [R, F], and h is [parts, R, F], where R is the number of (token, choice) pairs. The rows of both are sorted by
    expert. `activation` is the name of act, such as "swiglu".
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

    `hidden` [parts, R, F] is the pre-activation h, with rows sorted by expert. d_out [1, T, D] is the cotangent of the
    output of `expert_mlp`, and the weight is [E, F, D]. Row i of the tiles in `tasks` belongs to token source[i] and
    expert e, and its gate is gates[i]. For this row, the cotangent of gate * act(h) is

      dy = d_out[0, source[i]] @ weight[e]^T.

    Return (dh, gated, d_gate):

    `dh` [parts, R, F]: the gradient of h, gate * dy * act'(h), with rows sorted by expert.
    `gated` [R, F]: gate * act(h), with rows sorted by expert. The caller multiplies it by d_out for the gradient of the
      weight.
    `d_gate` [ranges of 128 columns, rows of all tiles]: for every row of the tiles, the sum of act(h) * dy over the
      columns of each range. The sum over the first axis is <act(h), dy>. This is the gradient of the gate, except for
      the term of b_out, the output bias of `expert_mlp`. `fused.mlp` adds this term.
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

        def halves():  # first 64 columns of h, then the other 64: all 128 columns do not fit into the registers
            for first in range(0, COLUMNS, HALF):
                parts = [own.hidden.at[p, at.wg, :, pl.ds(first, HALF)] for p in range(P)]
                h = [plgpu.load(x, layout=shims.TILE) for x in parts]
                plgpu.commit_smem()  # a barrier: all threads have read these values before a thread overwrites them
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
