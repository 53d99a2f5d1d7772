"""The kernel for dk and dv, the gradients of the keys and values, on Hopper GPUs.

The gradients are
    dk = scale * dz^T @ Q,  dv = A^T @ dO,
with the attention weights A, the gradients dz of the logits, and the cotangent dO of the output. mosaic_backward.py has
all formulas. docs/design/attention_kernels.md explains the barriers.

A block computes dk and dv of 64 keys of one key head. It loops over the query tiles whose queries see these keys, in
steps of one or two query tiles. The steps that need no mask come first. In a step, two warpgroups each compute half of
A and half of dz, and exchange them through shared memory. Then the first warpgroup adds A^T @ dO to dv, and the second
one adds dz^T @ Q to dk. So each warpgroup has only one of the two sums in registers. A sum of width H or Hv takes
width / 2 registers of each thread. The kernel has two forms:

- H and Hv up to 128: a step is two neighbouring query tiles, one for each warpgroup. A third warpgroup copies the query
  tiles to shared memory. With three warpgroups, a thread has 168 registers.
- H or Hv above 128: a sum takes up to 128 registers, so 168 are not enough. There is no third warpgroup, so a thread
  has 255 registers. The first warpgroup also copies the query tiles, one step ahead. A step is one query tile, and each
  warpgroup computes it for one half of the keys. The query tiles of two steps fit into the shared memory.

Predicted cost of one query tile at H = Hv = 256 (64 queries, 64 keys): 2560 clocks of the tensor cores, 1500 issue
slots, and 66 KB to copy. Of the 2560 clocks, 512 are lost, because some products have only 32 keys. Such a product
reads the same queries from shared memory for fewer keys. So it takes 0.75 of the time of a product with 64 keys, and
not 0.5.

There is an alternative, which this module does not use: one block computes dk, and another block computes dv. Then
three warpgroups would have enough registers. But both blocks would compute the weights. For each query tile, that is
five products instead of four, six special functions per score instead of four, and two copies to shared memory instead
of one.
"""

from functools import partial, reduce
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
from .mosaic_tile import KEYS, ROWS, Plan, tile_memory, visible, zeros

STAGES = 2  # pipeline stages: the query tiles of this number of steps are in shared memory at the same time
NOWHERE = -(2**30)  # a position to the left of all keys: a query there sees no keys
END = -1  # in `Scratch.visits`: this step has no query tiles. It ends one of the two passes over them (`_copies`)


class Inputs(NamedTuple):
    """References to the arrays in global memory that the kernel for dk and dv reads."""

    query: Any  # [B, T, N, H]
    key: Any  # [B, S, K, H]
    value: Any  # [B, S, K, Hv]
    d_out: Any  # [B, T, N, Hv], the cotangent of the output
    snapshots: Any  # [B, N, key tiles, 2 halves, 2, padded rows]: the log-decay of the keys on the right, and P
    reached: Any  # [B, N, query tiles]: index of the leftmost key tile that each query tile visited in the forward pass
    scale: Any  # [1]
    key_ranges: Any  # [B, query tiles, 4]: (stop, whole_stop, whole_start, start)
    offset: Any  # [B], the position of the first query among the keys
    segments: Any  # (segment ids of the queries, segment ids of the keys), or None


class Outputs(NamedTuple):
    """References to the arrays in global memory that the kernel writes: the gradients of the keys and values."""

    d_key: Any  # [B, S, K, H]
    d_value: Any  # [B, S, K, Hv]


class Scratch(NamedTuple):
    """The shared memory of a block, and the barriers that protect it.

    The kernel loops over the query tiles in steps. A step computes `tiles` query tiles: one if H or Hv is above 128,
    else two. The memory for query tiles is a ring of STAGES stages. A stage has room for the query tiles of one step.
    """

    key: Any  # [2 halves, HALF, H]
    value: Any  # [2 halves, HALF, Hv]
    query: Any  # for each tile of a step: [STAGES, ROWS, H]
    d_out: Any  # for each tile of a step: [STAGES, ROWS, Hv]
    snapshots: Any  # [STAGES, tiles, 2 halves, 2, ROWS]
    visits: Any  # [STAGES, tiles, 2]: for each query tile its kind (`_copies`) or END, and the index of its first row
    weights: Any  # [tiles, ROWS, KEYS]: A
    d_logits: Any  # [tiles, ROWS, KEYS]: dz
    resident: Any  # a barrier: the keys and values have arrived
    ring: pipeline.Ring  # two barriers for each stage. `full`: it can be read. `used`: it can be overwritten
    exchanged: Any  # a barrier: both warpgroups have written their A and dz of the step
    drained: Any  # a barrier: both warpgroups have read the A and dz of the step


class Block(NamedTuple):
    """The 64 keys whose gradients a block computes, as three indices: batch entry b, key head `head`, key tile j."""

    b: Any  # batch entry
    head: Any  # key head
    j: Any  # key tile


def has_steps_left(state):
    """Return whether the loop over the query tiles has steps left. The loop has two passes, with the numbers 0 and 1.

    `state` is (cursor, step). `cursor` says where the loop continues, by three indices: the pass, the query head (its
    index among the N / K query heads of the key head), and the query tile. `step` is the index of the next step. When
    both passes have ended, the index of the pass is 2.
    """
    cursor, _ = state
    return cursor[0] < 2


def is_wide(plan: Plan) -> bool:
    """Return whether H or Hv is above 128. Then dk or dv takes many registers, so a block has only two warpgroups."""
    return max(plan.H, plan.Hv) > 128


def d_key_value(
    plan: Plan, query, key, value, d_out, snapshots, reached, scale, key_ranges, offset,
    query_segments=None, key_segments=None,
):  # fmt: skip
    """Run the kernel for the gradients of the keys and values. Return (dk [B,S,K,H], dv [B,S,K,Hv]).

    `snapshots` is a result of `d_query`, and `reached` is a result of `forward`. The last arguments describe the mask.
    `Kernels.d_key_value` explains all arguments.
    """
    wide, dtype = is_wide(plan), plan.dtype
    tiles = 1 if wide else 2
    copies = 3 * tiles  # the number of arrays that are copied to shared memory in a step

    def kernel(inputs: Inputs, outputs: Outputs, scratch: Scratch):
        item = lax.axis_index("block")
        block = Block(b=item // plan.K % plan.B, head=item % plan.K, j=item // (plan.B * plan.K))
        offer = _copies(plan, inputs, scratch, block, copies)
        wg = lax.axis_index("wg")
        if not wide:

            @pl.when(wg == 2)
            def copy():
                lax.while_loop(has_steps_left, lambda state: offer(*state), ((jnp.int32(0),) * 3, jnp.int32(0)))

        for own, out_ref in enumerate((outputs.d_value, outputs.d_key)):
            copies_too = offer if wide and own == 0 else None
            pl.when(wg == own)(partial(_sum, plan, inputs, scratch, block, own, out_ref, copies_too))

    memory = partial(tile_memory, dtype=dtype, swizzle=SWIZZLE)
    run = pipeline.run(
        kernel,
        name="stick_breaking_d_key_value",
        flops=2 * plan.scores * (2 * plan.H + 2 * plan.Hv),
        blocks=plan.B * plan.K * plan.key_tiles,
        warpgroups=2 if wide else 3,
        out_type=Outputs(jax.ShapeDtypeStruct(key.shape, dtype), jax.ShapeDtypeStruct(value.shape, dtype)),
        scratch=(
            Scratch(
                key=memory((2, HALF, plan.H)),
                value=memory((2, HALF, plan.Hv)),
                query=(memory((STAGES, ROWS, plan.H)),) * tiles,
                d_out=(memory((STAGES, ROWS, plan.Hv)),) * tiles,
                snapshots=plgpu.SMEM((STAGES, tiles, 2, 2, ROWS), jnp.float32),
                visits=plgpu.SMEM((STAGES, tiles, 2), jnp.int32),
                weights=memory((tiles, ROWS, KEYS)),
                d_logits=memory((tiles, ROWS, KEYS)),
                resident=plgpu.Barrier(num_arrivals=4),
                ring=pipeline.ring(STAGES, arrivals=copies, readers=2),
                exchanged=plgpu.Barrier(num_arrivals=2),
                drained=plgpu.Barrier(num_arrivals=2),
            ),
        ),
    )
    segments = (query_segments, key_segments) if plan.segments else None
    scale = scale.reshape(1).astype(jnp.float32)
    return run(Inputs(query, key, value, d_out, snapshots, reached, scale, key_ranges, offset, segments))


def _copies(plan: Plan, inputs: Inputs, scratch: Scratch, block: Block, copies: int):
    """Return the function offer(cursor, step) -> (next cursor, next step), which copies query tiles to shared memory.

    A step of the kernel computes one query tile, or two neighbouring ones. The steps come in two passes over all query
    tiles of the query heads that use the key head of the block. Pass 0 has the steps that need no mask, and pass 1 has
    the steps that need a mask. If no query tile of a step visited the key tile of the block in the forward pass,
    neither pass has the step.

    One call of `offer` looks at the query tiles of one step. `cursor` says which: it is the index of the pass, the
    index of the query head among the N / K query heads of the key head, and the index of the first query tile. `step`
    is the number of the next step. There are three cases:
    - The pass has this step. `offer` starts to copy the queries, d_out and the snapshots of each query tile, `copies`
      arrays in total. The next step is `step` + 1.
    - The pass does not have this step. `offer` copies nothing. The next step is `step`.
    - The pass ends: the index of the query head is N / K. `offer` makes a step without query tiles, which tells the
      warpgroups that the pass ends. The next step is `step` + 1.
    """
    b, head, j = block
    G, tiles = plan.N // plan.K, len(scratch.query)
    query_tiles = inputs.key_ranges.shape[1]

    def kind(n, i):
        """Return the kind of query tile i of query head n: 0, 1 or 2.

        0: the block does not compute this query tile. 1: it computes it with a mask. 2: it computes it without a mask.
        """
        inside = i < query_tiles
        i = jnp.minimum(i, query_tiles - 1)
        stop, whole_stop, whole_start, start = (inputs.key_ranges[b, i, which] for which in range(4))
        visits = (j < stop) & (j >= start) & (j >= inputs.reached[b, n, i])
        return jnp.where(inside & visits, jnp.where((j < whole_stop) & (j >= whole_start), 2, 1), 0)

    def offer(cursor, step):
        masked, g, i = cursor
        is_end = g == G
        n = head * G + jnp.minimum(g, G - 1)
        kinds = [kind(n, i + w) for w in range(tiles)]
        all_whole = reduce(jnp.minimum, kinds) == 2
        is_due = is_end | jnp.where(masked == 0, all_whole, ~all_whole & (reduce(jnp.maximum, kinds) > 0))
        stage = pipeline.free_stage(scratch.ring, step, STAGES, when=is_due)

        @pl.when(is_due & is_end)
        def _():
            for w in range(tiles):
                scratch.visits[stage, w, 0] = END
            for _ in range(copies):
                plgpu.barrier_arrive(scratch.ring.full.at[stage])

        @pl.when(is_due & ~is_end)
        def _():
            for w in range(tiles):
                # If only one of two query tiles sees keys, it is copied in place of the other one too. The other one's
                # kind is 0, so its queries get the position NOWHERE and see no keys.
                row = (i + jnp.where(kinds[w] > 0, w, tiles - 1 - w)) * ROWS
                for what, x in enumerate((kinds[w], row)):
                    scratch.visits[stage, w, what] = x
                rows = pl.ds(row, ROWS)
                for source, memory in (
                    (inputs.query.at[b, rows, n], scratch.query[w].at[stage]),
                    (inputs.d_out.at[b, rows, n], scratch.d_out[w].at[stage]),
                    (inputs.snapshots.at[b, n, j, :, :, rows], scratch.snapshots.at[stage, w]),
                ):
                    plgpu.copy_gmem_to_smem(source, memory, scratch.ring.full.at[stage])

        is_last = i + tiles >= query_tiles  # the last step of a query head
        masked, g = masked + jnp.where(is_end, 1, 0), jnp.where(is_end, 0, g + jnp.where(is_last, 1, 0))
        cursor = masked, g, jnp.where(is_end | is_last, 0, i + tiles)
        return cursor, step + jnp.where(is_due, 1, 0)

    return offer


def _sum(plan: Plan, inputs: Inputs, scratch: Scratch, block: Block, own: int, out_ref, offer) -> None:
    """Compute one of the two gradients of the block: warpgroup `own` = 0 computes dv, and warpgroup 1 computes dk.

    In every step, each warpgroup also computes half of the weights A and half of the gradients dz of the logits. If
    `offer`, a result of `_copies`, is not None, the warpgroup also copies query tiles to shared memory, one step ahead.
    At the end, the warpgroup waits until the other warpgroup has read the query tiles. Then it overwrites the query
    tiles in shared memory with the gradient, and copies the gradient from there to `out_ref` in global memory.
    """
    b, head, j = block
    dtype, tiles = plan.dtype, len(scratch.query)
    mine, other = ((scratch.weights, scratch.d_out), (scratch.d_logits, scratch.query))[own]
    width, factor = ((plan.Hv, 1.0), (plan.H, inputs.scale[0]))[own]
    w, halves = (own, (0, 1)) if tiles == 2 else (0, (own,))  # its query tile of a step, and its halves of the keys
    if own == 0:
        for half in range(2):
            for ref, mem in ((inputs.key, scratch.key), (inputs.value, scratch.value)):
                part = ref.at[b, pl.ds(j * KEYS + half * HALF, HALF), head]
                plgpu.copy_gmem_to_smem(part, mem.at[half], scratch.resident)

    def copy(cursor, step):
        """Find the query tiles of step `step`, and start to copy them. Return the cursor after these query tiles.

        `cursor` is where the search begins: (pass, query head, query tile). Each call of `offer` looks at the one or
        two query tiles at the cursor, copies them if the pass selects them, and returns the next cursor.
        """
        is_to_find = lambda state: has_steps_left(state) & (state[1] == step)  # noqa: E731
        return lax.while_loop(is_to_find, lambda state: offer(*state), (cursor, step))[0]

    cursor = copy((jnp.int32(0),) * 3, jnp.int32(0)) if offer else None
    plgpu.barrier_wait(scratch.resident)
    multiplier, position = inputs.scale[0] * LOG2E, inputs.offset[b]

    def visit(masked, state):
        step, _, cursor, acc = state
        stage = pipeline.full_stage(scratch.ring, step, STAGES)
        if offer:
            cursor = copy(cursor, step + 1)
        kind, row = (scratch.visits[stage, w, what] for what in range(2))
        opaque = zeros(step, plan.H + plan.Hv > 64)

        def exchange(half):
            """Compute A and dz of one query tile and 32 keys, and write both to shared memory for the two warpgroups.

            A [64, 32] are the weights, and dz [64, 32] are the gradients of the logits. If `half` is 0, the keys are
            the first 32 keys of the key tile. If it is 1, they are the last 32 keys.
            """
            at, keys = stage + opaque[half], half + opaque[half]
            z = shims.product(scratch.query[w].at[at], scratch.key.at[keys].transpose((1, 0))) * multiplier
            d_weights = shims.product(scratch.d_out[w].at[at], scratch.value.at[keys].transpose((1, 0)))
            entered = scratch.snapshots.at[stage, w, half]
            entering, prefix = (plgpu.load(entered.at[part], layout=shims.ROW) for part in range(2))
            seen = None
            if masked:
                stands = jnp.where(kind > 0, position, NOWHERE)
                seen = visible(plan, inputs.segments, b, row, j * KEYS + half * HALF, HALF, stands)
            weights, logs = weights_of(z, seen, entering)
            dz, _ = d_logits(weights * d_weights, logs, prefix)
            if half == halves[0]:
                plgpu.barrier_wait(scratch.drained)
            scratch.weights[w, :, half * HALF : (half + 1) * HALF] = weights.astype(dtype)
            scratch.d_logits[w, :, half * HALF : (half + 1) * HALF] = dz.astype(dtype)

        def tile(acc):
            for half in halves:
                exchange(half)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.exchanged)
            plgpu.barrier_wait(scratch.exchanged)
            for t in range(tiles):
                zero = opaque[t]
                acc = shims.add_product(acc, mine.at[t + zero].transpose((1, 0)), other[t].at[stage + zero])
            plgpu.barrier_arrive(scratch.drained)
            return acc

        has_tiles = kind >= 0
        acc = lax.cond(has_tiles, tile, lambda acc: acc, acc)
        plgpu.barrier_arrive(scratch.ring.used.at[stage])
        return step + 1, has_tiles, cursor, acc

    acc = plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), shims.TILE)
    plgpu.barrier_arrive(scratch.drained)
    step = jnp.int32(0)
    for masked in (False, True):
        state = step, jnp.bool_(True), cursor, acc
        step, _, cursor, acc = lax.while_loop(lambda s: s[1], partial(visit, masked), state)
    plgpu.barrier_wait(scratch.drained)
    out_mem = other[w].at[0]
    out_mem[...] = (acc * factor).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_mem, out_ref.at[b, pl.ds(j * KEYS, KEYS), head])
    plgpu.wait_smem_to_gmem(0)
