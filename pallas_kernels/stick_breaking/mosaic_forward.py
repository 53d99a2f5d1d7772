"""The forward pass on Hopper GPUs (Pallas Mosaic GPU).

A block owns 64 query rows of one head per compute warpgroup and walks the key tiles from the diagonal to the left; a
third warpgroup copies the tiles ahead of it. All logarithms are base 2. What a row has spent of its stick is carried as
a positive number in two floats (`two_sum`), so that the backward pass can walk back without losing the small ones.

Registers stay where they are: everything fits the 168 per thread that three warpgroups leave, and JAX's linker ignores
the instruction that moves them.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import seam

ROWS = 64  # query rows of a warpgroup
LOG2E = math.log2(math.e)
# log2(1 + y) / y on [0, 1], highest power first, within 2.2e-7: seven multiply-adds instead of a special function.
_LOG2P1 = np.polynomial.Chebyshev.interpolate(
    lambda y: np.log1p(y) / np.maximum(y, 1e-300) / math.log(2), 7, [0, 1]
).convert(kind=np.polynomial.Polynomial)
LOG2P1 = _LOG2P1.coef[::-1].tolist()


class Plan(NamedTuple):
    """Static sizes of a call of the kernel."""

    B: int
    rows: int  # query rows of a head: T, or T * G where a group's heads are packed (decoding)
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    columns: int  # of a key tile
    stages: int  # key tiles in shared memory
    warpgroups: int  # that compute
    attend_current: bool
    window: int | None
    skip_below: float | None
    segments: bool
    per_position: int = 1  # query rows at one position
    splits: int = 1  # of the keys, each a batch entry of the spans and of the results
    out_dtype: jnp.dtype | None = None

    @property
    def tiles(self) -> int:
        """Blocks along the query rows."""
        return -(-self.rows // (ROWS * self.warpgroups))


def tile_memory(shape, dtype, swizzle: int = 128):
    """Shared memory for tiles [.., rows, width], swizzled by so many bytes: alike in both operands of a product."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * size)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


NOTHING = -1e30  # log2 of a beta of zero: a finite number, so that no difference of it is NaN


def sticks(z, seen=None):
    """(log2 of beta, -log2 of 1 - beta) of logits in units of log2; a key that is not seen breaks nothing off."""
    if seen is not None:
        z = jnp.where(seen, z, NOTHING)
    y = seam.exp2_of_minus_abs(z)
    poly = jnp.full_like(z, LOG2P1[0])
    for c in LOG2P1[1:]:
        poly = poly * y + c
    softplus = jnp.maximum(z, 0) + y * poly
    return z - softplus, softplus


def two_sum(high, low, x):
    """high + low + x, with the rounding error of the sum kept in the low part."""
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))


def visible(plan: Plan, columns, first_row, first_column, offset, query_segments, key_segments):
    """bool [64, columns] in registers."""
    shape = (ROWS, columns)
    row = first_row + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=seam.TILE)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=seam.TILE)
    # The last and the first column that a row sees, in columns of the tile: one comparison each for an element.
    position = offset + (row // plan.per_position if plan.per_position > 1 else row)
    last = jnp.minimum(position if plan.attend_current else position - 1, plan.S - 1) - first_column
    seen = column <= last
    if plan.window is not None:
        seen &= column >= position - plan.window - first_column
    if plan.segments:
        q = lax.broadcast_in_dim(query_segments, shape, [0])
        seen &= (q == lax.broadcast_in_dim(key_segments, shape, [1])) & (q >= 0)
    return seen


def block(plan: Plan):
    """(entry, query head, query tile) of this block: heavy tiles first, few heads at a time to share the cache."""
    heads = plan.B * plan.splits * plan.N
    together = max(1, 16 * 2**20 // max(1, plan.S * (plan.H + plan.Hv) * jnp.dtype(plan.dtype).itemsize))
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= together)
    i = lax.axis_index("block")
    group, i = i // (together * plan.tiles), i % (together * plan.tiles)
    head = group * together + i % together
    return head // plan.N, head % plan.N, plan.tiles - 1 - i // together


def visited(bound, warpgroups: int):
    """(stop, start) of the key tiles that some warpgroup of a block visits; `bound(w, which)` is from the table."""
    if warpgroups == 1:
        return bound(0, 0), bound(0, 3)
    (stop, start), (other_stop, other_start) = ((bound(w, 0), bound(w, 3)) for w in range(2))
    both = jnp.minimum(start, other_start)
    # An empty span starts and stops at 0.
    start = jnp.where(stop == 0, other_start, jnp.where(other_stop == 0, start, both))
    return jnp.maximum(stop, other_stop), start


def forward(plan: Plan, query, key, value, scale, spans, offset, query_segments=None, key_segments=None):
    """(out [B,rows,N,Hv], spent [2,B,N,rows padded], first visited tile [B,N,tiles * warpgroups]); B times splits."""
    W, C, stages, dtype = plan.warpgroups, plan.columns, plan.stages, plan.dtype
    skip = plan.skip_below is not None
    padded, entries, out_dtype = plan.tiles * W * ROWS, plan.B * plan.splits, plan.out_dtype or dtype
    shared = plan.H == plan.Hv and out_dtype == dtype  # the output takes the place of the query

    def stick_breaking_forward(q_ref, k_ref, v_ref, scale_ref, spans_ref, offset_ref, *refs):
        if plan.segments:
            (q_segments_ref, k_segments_ref), refs = refs[:2], refs[2:]
        out_ref, spent_ref, reached_ref, *refs = refs
        q_mem, out_mem, row_mem, k_mem, v_mem, needs, stopped, loaded, full, used = refs
        out_mem = q_mem if out_mem is None else out_mem
        entry, n, i = block(plan)
        b = entry % plan.B
        head = n // (plan.N // plan.K)
        wg = lax.axis_index("wg")

        def bound(w, which):
            return spans_ref[entry, i * W + w, which]

        stop, start = visited(bound, W)

        @pl.when(wg == W)
        def copy():
            def load(state):
                j, _ = state
                step = stop - 1 - j
                slot = step % stages

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                go = jnp.bool_(True)
                if skip:
                    needed = needs[0, slot] if W == 1 else jnp.maximum(needs[0, slot], needs[1, slot])
                    go = (step < stages) | (needed > 0)
                    stopped[slot] = jnp.where(go, 0, 1)

                @pl.when(go)
                def _():
                    for ref, mem in ((k_ref, k_mem), (v_ref, v_mem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(j * C, C), head], mem.at[slot], full.at[slot])

                if skip:

                    @pl.when(~go)
                    def _():
                        plgpu.barrier_arrive(full.at[slot])
                        plgpu.barrier_arrive(full.at[slot])

                return j - 1, go

            lax.while_loop(lambda s: (s[0] >= start) & s[1], load, (stop - 1, jnp.bool_(True)))

        @pl.when(wg < W)
        def compute():
            row = (i * W + wg) * ROWS
            plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(row, ROWS), n], q_mem.at[wg], loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            multiplier, position = scale_ref[0] * LOG2E, offset_ref[b]
            threshold = -plan.skip_below if skip else 0.0

            def visit(masked, state):
                j, _, high, low, acc = state
                slot = (stop - 1 - j) % stages
                plgpu.barrier_wait(full.at[slot])
                z = seam.product(q_mem.at[wg], k_mem.at[slot].transpose((1, 0))) * multiplier
                seen = None
                if masked:
                    q_segments = k_segments = None
                    if plan.segments:
                        q_segments = plgpu.load(q_segments_ref.at[b, pl.ds(row, ROWS)], layout=seam.ROW)
                        k_segments = plgpu.load(k_segments_ref.at[b, pl.ds(j * C, C)], layout=seam.COLUMN)
                    seen = visible(plan, C, row, j * C, position, q_segments, k_segments)
                log_beta, softplus = sticks(z, seen)
                log_weights, total = seam.minus_sum_right(log_beta, None, softplus, high)
                weights = jnp.exp2(log_weights)
                high, low = two_sum(high, low, total)
                acc = seam.add_product(acc, weights.astype(dtype), v_mem.at[slot])
                alive = jnp.bool_(True)
                if skip:
                    alive = jnp.min(high) <= threshold
                    needs[wg, slot] = jnp.where(alive & (j > own_start), 1, 0)
                plgpu.barrier_arrive(used.at[slot])
                return j - 1, alive, high, low, acc

            own_stop, whole_stop, whole_start, own_start = (bound(wg, which) for which in range(4))

            def wait_for_others(state):
                j, going = state
                slot = (stop - 1 - j) % stages
                plgpu.barrier_wait(full.at[slot])
                if skip:
                    going = stopped[slot] == 0
                    needs[wg, slot] = jnp.where((j >= own_stop) & (own_stop > own_start), 1, 0)
                plgpu.barrier_arrive(used.at[slot])
                return j - 1, going

            def idle(j, until):
                return lax.while_loop(lambda s: (s[0] >= until) & s[1], wait_for_others, (j, jnp.bool_(True)))[0]

            first = idle(stop - 1, own_stop)
            zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), seam.ROW)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.Hv), jnp.float32), seam.TILE)
            state = (first, jnp.bool_(True), zero, zero, acc)
            for masked, until in ((True, whole_stop), (False, whole_start), (True, own_start)):
                if skip:
                    state = lax.while_loop(lambda s, until=until: (s[0] >= until) & s[1], partial(visit, masked), state)
                else:
                    state = lax.fori_loop(
                        0, jnp.maximum(state[0] - until + 1, 0), lambda _, s, masked=masked: visit(masked, s), state
                    )
            j, _, high, low, acc = state
            idle(j, start)

            reached_ref[entry, n, i * W + wg] = j + 1
            out_mem[wg] = acc.astype(out_dtype)
            for part, x in enumerate((high, low)):
                row_mem[wg, part] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_mem.at[wg], out_ref.at[entry, pl.ds(row, ROWS), n])
            for part in range(2):
                plgpu.copy_smem_to_gmem(row_mem.at[wg, part], spent_ref.at[part, entry, n, pl.ds(row, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    out_type = (
        jax.ShapeDtypeStruct((entries, plan.rows, plan.N, plan.Hv), out_dtype),
        jax.ShapeDtypeStruct((2, entries, plan.N, padded), jnp.float32),
        jax.ShapeDtypeStruct((entries, plan.N, plan.tiles * W), jnp.int32),
    )
    scratch = (
        tile_memory((W, ROWS, plan.H), dtype),
        None if shared else tile_memory((W, ROWS, plan.Hv), out_dtype),
        plgpu.SMEM((W, 2, ROWS), jnp.float32),
        tile_memory((stages, C, plan.H), dtype),
        tile_memory((stages, C, plan.Hv), dtype),
        plgpu.SMEM((W, stages), jnp.int32),
        plgpu.SMEM((stages,), jnp.int32),
        plgpu.Barrier(num_barriers=W),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=W, num_barriers=stages),
    )
    run = plgpu.kernel(
        stick_breaking_forward,
        out_type=out_type,
        scratch_types=scratch,
        grid=(entries * plan.N * plan.tiles,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    segments = (query_segments, key_segments) if plan.segments else ()
    return run(query, key, value, scale.reshape(1).astype(jnp.float32), spans, offset, *segments)
