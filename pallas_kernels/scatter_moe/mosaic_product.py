"""Products of rows with the weights of their expert on Hopper GPUs (Pallas Mosaic GPU).

out[target[r]] = x[source[r]] @ weight[expert of r], where both row numbers come from `tasks`: all four cases of sorted
and scattered rows are one kernel. Blocks stay and take one tile after the other; in each, a warpgroup copies rows by
their numbers and weights by the copy engine ahead of one or two that multiply 64 rows each, with two accumulators of 64
x 128. What follows the product (an activation, its derivative) runs on the accumulators.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import seam, seam_rows
from . import mosaic_pipeline as pipeline
from .call import activate, d_activate
from .mosaic_pipeline import STAGES, memory
from .tasks import Tasks

ROWS = 64  # of a warpgroup
COLUMNS = 128  # of an accumulator
HALF = COLUMNS // 2
DEPTH = 64  # of a step


class Plan(NamedTuple):
    """Static sizes. A row of x or of the result is in `parts` arrays of one width each: the halves of a gated layer."""

    x_parts: int
    width: int  # of a part of x
    columns: int  # of a part of the result
    parts: int
    dtype: jnp.dtype
    warpgroups: int
    transposed: bool = False  # weight [E, columns, width]
    first: int = 0  # column of the weight
    out_dtype: jnp.dtype | None = None  # of `product`; None: dtype

    @property
    def rows(self) -> int:
        """Of a tile."""
        return ROWS * self.warpgroups


class At(NamedTuple):
    """Where a warpgroup's accumulators stand: rows in tiles, expert, first column of the result."""

    wg: jax.Array
    rows: pl.Slice
    expert: jax.Array
    column: jax.Array


def _product(
    plan: Plan,
    name: str,
    finish: Callable,
    x,
    source,
    weight,
    tasks: Tasks,
    inputs: tuple,
    out_type: tuple,
    scratch: tuple,
    *,
    per_tile: int,
    apart: int,
    prefetch: Callable | None = None,
):
    """The kernel around `finish(At, accumulators, inputs, outputs, scratch)`.

    `per_tile` accumulators, of columns `apart` of each other, make `step` columns of a part of the result at a time.
    `prefetch` starts to copy more rows for a tile after its steps, and returns the barrier that tells of them.
    """
    W, E = plan.warpgroups, weight.shape[0]
    step = per_tile * COLUMNS if apart == COLUMNS else COLUMNS
    across = -(-plan.columns // step)
    per_part = -(-plan.width // DEPTH)
    blocks = pipeline.blocks(tasks.expert.shape[0] * across)

    def kernel(x_ref, source_ref, expert_ref, count_ref, w_ref, *refs):
        in_refs, refs = refs[: len(inputs)], refs[len(inputs) :]
        out_refs, refs = refs[: len(out_type)], refs[len(out_type) :]
        x_mem, w_mems, full, used, *own = refs
        wg, ring = lax.axis_index("wg"), pipeline.Ring(full, used)

        def tiles(body, state):
            def one(i, number, state):
                tile, column = number // across, number % across * step
                e = expert_ref[tile]
                # No product for the slots without an expert.
                return body(i, tile, column, e, jnp.where(e < E, plan.x_parts * per_part, 0), state)

            return pipeline.every(blocks, count_ref[0] * across, one, state)

        @pl.when(wg == W)
        def copy():
            def body(i, tile, column, e, steps, before):
                def load(s, slot):
                    part, depth = s // per_part, s % per_part * DEPTH
                    for w in range(W):
                        rows = source_ref.at[pl.ds(tile * plan.rows + w * ROWS, ROWS)]
                        seam_rows.gather(x_ref.at[part], rows, depth, x_mem.at[slot, w])
                    for p, w_mem in enumerate(w_mems):
                        inner = pl.ds(part * plan.width + depth, DEPTH)
                        outer = pl.ds(plan.first + column + p * apart, COLUMNS)
                        at = (e, outer, inner) if plan.transposed else (e, inner, outer)
                        plgpu.copy_gmem_to_smem(w_ref.at[at], w_mem.at[slot], full.at[slot])

                sent = pipeline.send(ring, steps, load, before)
                if prefetch is not None:
                    # It waits for the tile before to be finished, which needs all of its steps.
                    sent = pipeline.hand_over(ring, sent, before=before.started)
                    there = prefetch(i, tile, column, in_refs, own)
                    sent = pipeline.hand_over(ring, sent)
                    seam_rows.gather_wait(0)
                    plgpu.barrier_arrive(there)
                return sent

            pipeline.hand_over(ring, tiles(body, pipeline.nothing_sent()))

        @pl.when(wg < W)
        def compute():
            def body(i, tile, column, e, steps, step):
                def multiply(*accumulators):
                    def one(slot):
                        for acc, w_mem in zip(accumulators, w_mems, strict=True):
                            w = w_mem.at[slot]
                            plgpu.wgmma(acc, x_mem.at[slot, wg], w.transpose((1, 0)) if plan.transposed else w)

                    last = pipeline.receive(ring, steps, one, per_tile, step)
                    return last, *(acc[...] for acc in accumulators)

                accumulator = plgpu.ACC((ROWS, COLUMNS), jnp.float32)
                last, *accumulators = pl.run_scoped(multiply, *(accumulator,) * per_tile)
                at = At(wg, pl.ds(tile * plan.rows + wg * ROWS, ROWS), e, column)
                finish(at, accumulators, in_refs, out_refs, own)
                return last

            tiles(body, jnp.int32(0))

    w_shape = (STAGES, COLUMNS, DEPTH) if plan.transposed else (STAGES, DEPTH, COLUMNS)
    own = (
        memory((STAGES, W, ROWS, DEPTH), plan.dtype),
        (memory(w_shape, plan.dtype),) * per_tile,
        plgpu.Barrier(num_arrivals=1 + per_tile, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=W, num_barriers=STAGES),
    )
    products = 1 if plan.transposed else plan.parts  # of [rows, columns] each
    flops = 2 * tasks.place.shape[0] * plan.x_parts * plan.width * plan.columns * products
    run = pipeline.run(
        kernel, name=name, flops=flops, blocks=blocks, warpgroups=W, out_type=out_type, scratch=(*own, *scratch)
    )
    return run(x, source, tasks.expert, tasks.count, weight, *inputs)


def _store(values, numbers, memory, column, out_ref) -> None:
    """values [64, 128] as rows of an array, by their numbers; through memory for all of them or for half."""
    at_once = memory.shape[1]
    for first in range(0, COLUMNS, at_once):
        memory[...] = values[:, first : first + at_once].astype(memory.dtype)
        plgpu.commit_smem()
        seam_rows.scatter(memory, numbers, column + first, out_ref)
        plgpu.commit_smem()


def _biased(accumulator, bias_ref, part, at):
    bias = plgpu.load(bias_ref.at[at.expert, part, pl.ds(at.column, COLUMNS)], layout=seam.COLUMN)
    return accumulator + lax.broadcast_in_dim(bias, accumulator.shape, [1])


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """[rows, columns]: the products in the rows `target`; other rows are not written.

    x [parts, rows, width], weight [E, parts * width, F] (or transposed), bias [E + 1, parts, columns padded], of
    which the last expert's is zero.
    """

    def finish(at, accumulators, inputs, outputs, own):
        (target_ref, *bias_ref), (out_ref,), (memory,) = inputs, outputs, own
        for p, acc in enumerate(accumulators):
            at = at._replace(column=at.column + p * COLUMNS)
            y = _biased(acc, *bias_ref, 0, at) if bias_ref else acc
            _store(y, target_ref.at[at.rows], memory.at[at.wg], at.column, out_ref)

    inputs = (target,) if bias is None else (target, bias)
    dtype = plan.out_dtype or plan.dtype
    (out,) = _product(
        plan, "expert_product", finish, x, source, weight, tasks, inputs,
        (jax.ShapeDtypeStruct((rows, plan.columns), dtype),),
        (memory((plan.warpgroups, ROWS, COLUMNS * 2 // dtype.itemsize), dtype),),
        per_tile=2, apart=COLUMNS,
    )  # fmt: skip
    return out


def activated(plan: Plan, activation: str, x, source, weight, tasks: Tasks, bias=None, *, keep: bool):
    """(act(h) [R, F], h [parts, R, F] if `keep`) of h = x @ weight + bias, in sorted rows."""
    R, P = tasks.place.shape[0], plan.parts

    def finish(at, accumulators, inputs, outputs, own):
        (sorted_ref, *bias_ref), (memory,), (out_ref, *hidden_ref) = inputs, own, outputs
        numbers, memory = sorted_ref.at[at.rows], memory.at[at.wg]
        halves = []
        for p, h in enumerate(accumulators):
            if bias_ref:
                plgpu.commit_smem()  # keeps the compiler from loading all biases at once: they would not fit
                h = _biased(h, *bias_ref, p, at)
            if keep:
                _store(h, numbers, memory, at.column, hidden_ref[0].at[p])
            halves.append(h)
        _store(activate(activation, *halves), numbers, memory, at.column, out_ref)

    inputs = (tasks.sorted,) if bias is None else (tasks.sorted, bias)
    shape = jax.ShapeDtypeStruct((R, plan.columns), plan.dtype)
    kept = (jax.ShapeDtypeStruct((P, R, plan.columns), plan.dtype),) if keep else ()
    return _product(
        plan, "expert_activated", finish, x, source, weight, tasks, inputs, (shape, *kept),
        (memory((plan.warpgroups, ROWS, COLUMNS), plan.dtype),),
        per_tile=P, apart=plan.columns,
    )  # fmt: skip


def d_activated(plan: Plan, activation: str, d_out, source, weight, tasks: Tasks, hidden, gates):
    """(dh [parts, R, F], gate * act(h) [R, F], <act(h), dy> of every row of the tiles, in parts).

    With dy = d_out @ weight^T: the derivative of sum gate * act(h) @ weight. `gates` [tiles * rows] in fp32.
    """
    R, (P, _, F) = tasks.place.shape[0], hidden.shape
    W, dtype = plan.warpgroups, plan.dtype

    def prefetch(i, tile, column, inputs, own):
        (sorted_ref, hidden_ref, _), (hidden_mem, *_, there, free) = inputs, own

        @pl.when(i > 0)
        def _():
            plgpu.barrier_wait(free)

        for w in range(W):
            numbers = sorted_ref.at[pl.ds(tile * plan.rows + w * ROWS, ROWS)]
            for p in range(P):
                seam_rows.gather(hidden_ref.at[p], numbers, column, hidden_mem.at[p, w])
        seam_rows.gather_commit()
        return there

    def finish(at, accumulators, inputs, outputs, own):
        (sorted_ref, _, gates_ref), (dh_ref, gated_ref, d_gate_ref) = inputs, outputs
        hidden_mem, gated_mem, there, free = own
        numbers, (acc,) = sorted_ref.at[at.rows], accumulators
        gate = plgpu.load(gates_ref.at[at.rows], layout=seam.ROW)
        gate = lax.broadcast_in_dim(gate, (ROWS, HALF), [0])
        plgpu.barrier_wait(there)
        d_gate = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), seam.ROW)

        # In two passes, and in halves: everything at once would not fit the registers.
        def halves():
            for first in range(0, COLUMNS, HALF):
                own = [hidden_mem.at[p, at.wg, :, pl.ds(first, HALF)] for p in range(P)]
                h = [plgpu.load(x, layout=seam.TILE) for x in own]
                plgpu.commit_smem()  # all have read what is overwritten next
                yield slice(first, first + HALF), own, [x.astype(jnp.float32) for x in h]

        for columns, _, h in halves():
            a = activate(activation, *h)
            d_gate += (a * acc[:, columns]).sum(1)
            gated_mem[at.wg, :, columns] = (a * gate).astype(dtype)
        d_gate_ref[at.column // COLUMNS, at.rows] = d_gate
        for columns, own, h in halves():
            for x, dh in zip(own, d_activate(activation, acc[:, columns] * gate, *h), strict=True):
                x[...] = dh.astype(dtype)
        plgpu.commit_smem()
        seam_rows.scatter(gated_mem.at[at.wg], numbers, at.column, gated_ref)
        for p in range(P):
            seam_rows.scatter(hidden_mem.at[p, at.wg], numbers, at.column, dh_ref.at[p])
        plgpu.commit_smem()
        plgpu.barrier_arrive(free)

    return _product(
        plan, "expert_d_activated", finish, d_out, source, weight, tasks, (tasks.sorted, hidden, gates),
        (
            jax.ShapeDtypeStruct(hidden.shape, dtype),
            jax.ShapeDtypeStruct((R, F), dtype),
            jax.ShapeDtypeStruct((-(-F // COLUMNS), gates.shape[0]), jnp.float32),
        ),
        (
            memory((P, W, ROWS, COLUMNS), dtype),
            memory((W, ROWS, COLUMNS), dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=W),
        ),
        per_tile=1, apart=COLUMNS, prefetch=prefetch,
    )  # fmt: skip
