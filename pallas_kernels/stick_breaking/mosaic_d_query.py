"""The kernel for dq, the gradient of the queries, on Hopper GPUs. It also writes snapshots for `d_key_value`.

The snapshots are two numbers for every query row and half of a key tile:
- the sum of -log2(1 - beta) over all keys on the right of the half;
- P, which is d_log_rem plus the sum of `a` over all keys on the left of the half.
Here, beta is the sigmoid of a logit, `a` is the weight times the cotangent of the weight, and d_log_rem is the
cotangent of log_rem, the natural logarithm of the part of the stick that remains.
mosaic_backward.py has all formulas. docs/design/attention_kernels.md explains the barriers.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_pipeline as pipeline
from .. import mosaic_shims as shims
from .logarithm import LOG2E
from .mosaic_backward import HALF, SWIZZLE, d_logits, weights_of
from .mosaic_tile import KEYS, ROWS, Assignment, Plan, block, tile_memory, two_sum, visible, visited, zeros


class Inputs(NamedTuple):
    """References to the arrays in global memory that the kernel for dq reads.

    In the shapes of the fields, W is the number of computing warpgroups of a block, and `tiles` is the number of blocks
    of a head. So a head has tiles * W query tiles.
    """

    query: Any  # [B, T, N, H]
    key: Any  # [B, S, K, H]
    value: Any  # [B, S, K, Hv]
    d_out: Any  # [B, T, N, Hv], the cotangent of the output
    d_log_rem: Any  # [B, N, padded rows], the cotangent of log_rem
    log_decay: Any  # [2, B, N, padded rows], a result of the forward pass: the cumulative log-decay in two floats
    reached: Any  # [B, N, tiles * W], a result of `forward`: index of the leftmost key tile that a query tile visited
    scale: Any  # [1]
    key_ranges: Any  # [B, tiles * W, 4]: (stop, whole_stop, whole_start, start)
    offset: Any  # [B], the position of the first query among the keys
    segments: Any  # (segment ids of the queries, segment ids of the keys), or None


class Outputs(NamedTuple):
    """References to the arrays in global memory that the kernel writes: dq, d_scale, snapshots for `d_key_value`."""

    d_query: Any  # [B, T, N, H]
    d_scale: Any  # [B, N, padded rows]: what every query row adds to the gradient of the scale
    snapshots: Any  # [B, N, key tiles, 2 halves, 2, padded rows]: the log-decay of the keys on the right, and P


class Scratch(NamedTuple):
    """The shared memory of a block, and the barriers that protect it.

    In the shapes of the fields, W is the number of computing warpgroups of the block, and `stages` is the number of key
    tiles that are in shared memory at the same time.
    """

    query: Any  # [W, ROWS, H]; at the end, dq overwrites it
    d_out: Any  # [W, ROWS, Hv]
    rows: Any  # [W, 3, ROWS]: d_log_rem, and the cumulative log-decay in two floats
    key: Any  # two halves of [stages, HALF, H]
    value: Any  # two halves of [stages, HALF, Hv]
    snapshots: Any  # [W, 2 halves, 2, ROWS], before they are copied to global memory
    loaded: Any  # a barrier for each computing warpgroup: its query rows have arrived
    ring: pipeline.Ring  # two barriers for each stage. `full`: it can be read. `used`: it can be overwritten


def d_query(
    plan: Plan, query, key, value, d_out, d_log_rem, log_decay, reached, scale, key_ranges, offset,
    query_segments=None, key_segments=None,
):  # fmt: skip
    """Run the kernel for the gradient of the queries. Return (dq [B,T,N,H], d_scale [B,N,padded rows], snapshots).

    d_scale is what every query row adds to the gradient of the scale. The snapshots
    [B, N, key tiles, 2 halves, 2, padded rows] are two numbers for every query row and half of a key tile:
    - the sum of -log2(1 - beta) over all keys on the right of the half;
    - P: d_log_rem plus the sum of weight * <d_out, value> over all keys on the left of the half.
    The snapshots of a query tile are written only for the key tiles that are computed for this query tile. `log_decay`
    and `reached` are results of the forward pass, and the last arguments describe the mask. `Kernels.d_query` explains
    all arguments.
    """
    W, stages, dtype = plan.warpgroups, plan.stages, plan.dtype
    memory = partial(tile_memory, dtype=dtype, swizzle=SWIZZLE)

    def kernel(inputs: Inputs, outputs: Outputs, scratch: Scratch):
        b, n, i = block(plan)
        head, wg = n // (plan.N // plan.K), lax.axis_index("wg")
        stop, start = visited(partial(_bound, inputs, b, n, i * W), W)
        assigned = Assignment(b, b, n, head, i, wg, stop, start)
        pl.when(wg == W)(partial(_copy, plan, assigned, inputs, scratch))
        pl.when(wg < W)(partial(_compute, plan, assigned, inputs, outputs, scratch))

    run = pipeline.run(
        kernel,
        name="stick_breaking_d_query",
        flops=2 * plan.scores * (2 * plan.H + plan.Hv),
        blocks=plan.B * plan.N * plan.tiles,
        warpgroups=W + 1,
        out_type=Outputs(
            d_query=jax.ShapeDtypeStruct(query.shape, dtype),
            d_scale=jax.ShapeDtypeStruct((plan.B, plan.N, plan.padded), jnp.float32),
            snapshots=jax.ShapeDtypeStruct((plan.B, plan.N, plan.key_tiles, 2, 2, plan.padded), jnp.float32),
        ),
        scratch=(
            Scratch(
                query=memory((W, ROWS, plan.H)),
                d_out=memory((W, ROWS, plan.Hv)),
                rows=plgpu.SMEM((W, 3, ROWS), jnp.float32),
                key=(memory((stages, HALF, plan.H)),) * 2,
                value=(memory((stages, HALF, plan.Hv)),) * 2,
                snapshots=plgpu.SMEM((W, 2, 2, ROWS), jnp.float32),
                loaded=plgpu.Barrier(num_arrivals=5, num_barriers=W),
                ring=pipeline.ring(stages, arrivals=4, readers=W),
            ),
        ),
    )
    segments = (query_segments, key_segments) if plan.segments else None
    scale = scale.reshape(1).astype(jnp.float32)
    return run(Inputs(query, key, value, d_out, d_log_rem, log_decay, reached, scale, key_ranges, offset, segments))


def _bound(inputs: Inputs, b, n, first, w, which):
    """Return one number of the key-tile range of query tile first + w, for batch entry b and query head n.

    `which` selects the number: 0 is stop, 1 is whole_stop, 2 is whole_start, and 3 is start (see `key_tile_ranges`).
    The range is limited to the key tiles that the forward pass computed. `first` is the index of the first query tile
    of the block, and w is the index of the warpgroup.
    """
    x = inputs.key_ranges[b, first + w, which]
    return jnp.maximum(x, inputs.reached[b, n, first + w]) if which else x


def _copy(plan: Plan, assigned: Assignment, inputs: Inputs, scratch: Scratch) -> None:
    """Copy the keys and values of the block to shared memory, tile by tile from left to right.

    The copying warpgroup runs this function.
    """

    def copy(step, _):
        stage = pipeline.free_stage(scratch.ring, step, plan.stages)
        for half in range(2):
            keys = pl.ds((assigned.start + step) * KEYS + half * HALF, HALF)
            for ref, mem in ((inputs.key, scratch.key), (inputs.value, scratch.value)):
                tile = ref.at[assigned.b, keys, assigned.head]
                plgpu.copy_gmem_to_smem(tile, mem[half].at[stage], scratch.ring.full.at[stage])

    lax.fori_loop(0, jnp.maximum(assigned.stop - assigned.start, 0), copy, None)


def _compute(plan: Plan, assigned: Assignment, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
    """Compute dq, d_scale and the snapshots of 64 query rows. Each computing warpgroup runs this function.

    The warpgroup computes the key tiles in the key-tile range of its rows, from left to right. If the block has two
    computing warpgroups, their ranges may differ. At a key tile that only the other warpgroup needs, this warpgroup
    only waits for the barrier `full` and arrives at the barrier `used`.
    """
    b, n, wg, dtype = assigned.b, assigned.n, assigned.wg, plan.dtype
    row = (assigned.i * plan.warpgroups + wg) * ROWS
    rows = pl.ds(row, ROWS)
    for source, mem in (
        (inputs.query.at[b, rows, n], scratch.query.at[wg]),
        (inputs.d_out.at[b, rows, n], scratch.d_out.at[wg]),
        (inputs.d_log_rem.at[b, n, rows], scratch.rows.at[wg, 0]),
        (inputs.log_decay.at[0, b, n, rows], scratch.rows.at[wg, 1]),
        (inputs.log_decay.at[1, b, n, rows], scratch.rows.at[wg, 2]),
    ):
        plgpu.copy_gmem_to_smem(source, mem, scratch.loaded.at[wg])
    plgpu.barrier_wait(scratch.loaded.at[wg])
    prefix, high, low = (plgpu.load(scratch.rows.at[wg, part], layout=shims.ROW) for part in range(3))
    multiplier, position = inputs.scale[0] * LOG2E, inputs.offset[b]

    def visit(masked, j, state):
        stage = pipeline.full_stage(scratch.ring, j - assigned.start, plan.stages)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until the copy engine has read the previous snapshots
        for half, zero in enumerate(zeros(j, plan.H + plan.Hv > 128 or plan.segments)):
            prefix, high, low, acc = state
            own, column = wg + zero, j * KEYS + half * HALF
            keys, values = (mem[half].at[stage] for mem in (scratch.key, scratch.value))
            z = shims.product(scratch.query.at[own], keys.transpose((1, 0))) * multiplier
            d_weights = shims.product(scratch.d_out.at[own], values.transpose((1, 0)))
            seen = None
            if masked:
                seen = visible(plan, inputs.segments, b, row, column, HALF, position)
            entered = []

            def entering(total, entered=entered, high=high, low=low):
                entered[:] = two_sum(high, low, -total)
                return entered[0] + entered[1]

            weights, logs = weights_of(z, seen, entering)
            dz, total_a = d_logits(weights * d_weights, logs, prefix)
            acc = shims.add_product(acc, dz.astype(dtype), keys)
            scratch.snapshots[wg, half, 0], scratch.snapshots[wg, half, 1] = entered[0] + entered[1], prefix
            state = prefix + total_a, *entered, acc
        plgpu.barrier_arrive(scratch.ring.used.at[stage])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.snapshots.at[wg], outputs.snapshots.at[b, n, j, :, :, rows])
        return state

    def idle(j, _):
        stage = pipeline.full_stage(scratch.ring, j - assigned.start, plan.stages)
        plgpu.barrier_arrive(scratch.ring.used.at[stage])

    first = assigned.i * plan.warpgroups
    own_stop, whole_stop, whole_start, own_start = (_bound(inputs, b, n, first, wg, which) for which in range(4))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.H), jnp.float32), shims.TILE)
    state = prefix, high, low, acc
    lax.fori_loop(assigned.start, jnp.minimum(own_start, assigned.stop), idle, None)
    state = lax.fori_loop(own_start, whole_start, partial(visit, True), state)
    state = lax.fori_loop(whole_start, whole_stop, partial(visit, False), state)
    state = lax.fori_loop(jnp.maximum(whole_stop, own_start), own_stop, partial(visit, True), state)
    lax.fori_loop(jnp.maximum(own_stop, assigned.start), assigned.stop, idle, None)
    *_, acc = state
    _write(plan, assigned, rows, acc, inputs, outputs, scratch)


def _write(
    plan: Plan, assigned: Assignment, rows, acc, inputs: Inputs, outputs: Outputs, scratch: Scratch
) -> None:  # fmt: skip
    """Write d_scale and dq of the 64 query rows of a warpgroup to global memory. dq goes through shared memory.

    `acc` [64, H], in registers, is the matrix product dz @ K over all keys, where dz are the gradients of the logits.
    So dq is scale * acc. d_scale of a row is the term that the row adds to the gradient of the scale: <acc, query>.
    `rows` is the slice of the 64 query rows in the arrays.
    """
    b, n, wg = assigned.b, assigned.n, assigned.wg
    # d_scale is the sum of dz * <q, k> over the keys, which is <acc, q>. It uses acc before acc is rounded. It is
    # computed in pieces of HALF columns, to save registers.
    d_scale = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW)
    for first in range(0, plan.H, HALF):
        q = plgpu.load(scratch.query.at[wg, :, pl.ds(first, HALF)], layout=shims.TILE).astype(jnp.float32)
        d_scale += (acc[:, first : first + HALF] * q).sum(1)
    plgpu.commit_smem()  # wait until all threads have read the queries, which are overwritten next
    outputs.d_scale[b, n, rows] = d_scale
    scratch.query[wg] = (acc * inputs.scale[0]).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.query.at[wg], outputs.d_query.at[b, rows, n])
    plgpu.wait_smem_to_gmem(0)
