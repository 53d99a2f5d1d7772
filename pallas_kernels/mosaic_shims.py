"""Shims: operations of the Mosaic kernels that have a GPU body and an interpreter body.

The GPU body runs on a GPU. The Mosaic GPU interpreter cannot run the GPU body. The interpreter body runs on a CPU, when
the interpreter runs a kernel. Only `product` has a single body, which runs on a GPU and in the interpreter.
docs/design/attention_kernels.md says which barriers the GPU bodies rely on.

An array [64, C] that tensor cores compute is spread over the registers of a warpgroup, in this layout. The 128 threads
of the warpgroup form quads of four neighbouring threads. A quad holds all C columns of two rows: an upper row, and a
lower row, which is 8 rows below. The columns form groups of 8. Thread t of the quad (t from 0 to 3) holds, in both
rows, the columns 8 * g + 2 * t and 8 * g + 2 * t + 1 of every group g. In the code of this module, `half` is 0 for the
upper row and 1 for the lower row.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from .platform import is_interpreted

TILE = plgpu.Layout.WGMMA  # [64, C]
ROW = plgpu.Layout.WGMMA.reduce(1)  # [64], one value per row
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # [C], one value per column


def product(a, b):
    """Compute the matrix product a @ b on the tensor cores. Return it as an fp32 array [64, C] in registers.

    `a` [64, D] and `b` [D, C] are references to shared memory. Each of them may be a transposed view of a tile.
    """

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_product(acc, a, b):
    """Compute acc + a @ b on the tensor cores. Return it as an fp32 array [64, C] in registers.

    `acc` [64, C] is in registers. `a` [64, D] is in registers or is a reference to shared memory. `b` [D, C] is a
    reference to shared memory.
    """
    if is_interpreted():
        result = acc + jnp.dot(a if isinstance(a, jax.Array) else a[...], b[...], preferred_element_type=jnp.float32)
        # The race detector requires a fence here, because a copy may overwrite b next. On a GPU no fence is needed:
        # tensor cores and the copy engine use the same path to shared memory.
        plgpu.commit_smem()
        return result
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def exp2_of_minus_abs(x):
    """Return 2^-|x| in fp32, for every element of an array x [64, C] in registers.

    The attention kernels use it to compute log2(1 + 2^x) = max(x, 0) + log2(1 + 2^-|x|), where x is a logit times
    log2(e). The GPU body takes one instruction for each element, because the exponential instruction of the GPU can
    also take the absolute value and change the sign. LLVM would emit a second instruction for the sign.
    """
    if is_interpreted():
        return jnp.exp2(-jnp.abs(x))
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm, vector

    ptx = "{ .reg .f32 a; abs.f32 a, $1; neg.f32 a, a; ex2.approx.ftz.f32 $0, a; }"

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=TILE))
    def run(ctx, x):
        f32, registers = ir.F32Type.get(), x.registers.copy()
        for index, register in np.ndenumerate(x.registers):
            elements = [vector.extract(register, [], [i]) for i in range(2)]
            elements = [llvm.inline_asm(f32, [e], ptx, "=f,f") for e in elements]
            registers[index] = vector.from_elements(register.type, elements)
        return _like(x, registers)

    return run(x)


def any_at_most(x, limit: float):
    """Return whether x[r] <= limit for at least one row r. `x` [64] is in registers, with one value for every row.

    The forward attention kernel uses it for early exit. There, x[r] is the cumulative log-decay of query row r: -log2
    of the part of the stick that remains for the next keys. The warpgroup reads more keys while x[r] <= limit in at
    least one row.

    In the GPU body, the threads vote on a named barrier that only this warpgroup uses. `jnp.any` would use shared
    memory that all warpgroups of a block share: two warpgroups would overwrite each other's values.
    """
    if is_interpreted():
        return (x <= limit).any()
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, vector
    from jax.experimental.mosaic.gpu import FragmentedArray, utils

    # The number of the barrier is computed at every call, because the loop has no free register to keep it.
    ptx = (
        "{ .reg .pred mine, any; .reg .b32 barrier; mov.u32 barrier, %tid.x; shr.u32 barrier, barrier, 7; "
        "add.u32 barrier, barrier, 1; setp.ne.b32 mine, $1, 0; "
        f"bar.red.or.pred any, barrier, {utils.WARPGROUP_SIZE}, mine; selp.b32 $0, 1, 0, any; }}"
    )

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=ROW))
    def vote(ctx, x):
        i32, most, mine = ir.IntegerType.get_signless(32), utils.c(limit, ir.F32Type.get()), None
        for register in x.registers.flat:
            own = arith.cmpf(arith.CmpFPredicate.OLE, vector.extract(register, [], [0]), most)
            mine = own if mine is None else arith.ori(mine, own)
        result = llvm.inline_asm(i32, [arith.extui(i32, mine)], ptx, "=r,r", has_side_effects=True)
        return FragmentedArray.splat(result, (), is_signed=True)

    return vote(x) != 0


def row_numbers():
    """Return the row numbers 0 to 63 of a tile, int32 [64] in registers. Every call computes them again.

    `broadcasted_iota` gives the same numbers, but can need more registers. If a kernel calls it before a loop and in
    the loop, the compiler computes the numbers only once, and they occupy registers during the complete loop. This
    function computes the numbers from the index of the thread, and the compiler does not merge two calls.
    """
    if is_interpreted():
        return jnp.arange(64, dtype=jnp.int32)
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm, vector
    from jax.experimental.mosaic.gpu import FragmentedArray, utils

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((64,), jnp.int32, layout=ROW))
    def run(ctx):
        i32, layout = ir.IntegerType.get_signless(32), ROW.to_mgpu()

        def on_values(op):
            return lambda x, y: op(x, utils.c(y, i32) if isinstance(y, int) else y)

        arithmetic = [on_values(op) for op in (arith.shrui, arith.andi, arith.ori)]
        thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
        registers = np.empty(layout.registers_shape((64,)), object)
        for half, index in enumerate(np.ndindex(registers.shape)):
            number = row_of_thread(thread, half, *arithmetic)
            registers[index] = vector.from_elements(ir.VectorType.get((1,), i32), [number])
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return run()


def row_of_thread(thread, half: int, right, bits, either):
    """Return the number (0 to 63) of one of the two rows that a thread holds, in an array [64, C] in registers.

    `thread`: the index of the thread in its block.
    `half`: 0 for the upper row of the thread, 1 for its lower row, which is 8 rows below.
    `right(x, n)`, `bits(x, n)`, `either(x, y)`: functions that return x >> n, x & n and x | y, for Python numbers or
      MLIR values.

    Each of the four warps of a warpgroup holds 16 rows of the array. A warp has 8 quads of four neighbouring threads.
    Quad q (q from 0 to 7) holds the rows q and q + 8 of these 16 rows.
    """
    warp, quad = bits(right(thread, 1), 48), bits(right(thread, 2), 7)
    return either(warp, either(quad, 8 * half))


def minus_sum_right(minuend, factor, x, start):
    """Subtract from each element of `minuend` the sum of `x` over the columns to its right. Return (y, sums).

      y[r, c] = minuend[r, c] - factor[r, c] * (start[r] + sum of x[r, m] over m > c)
      sums[r] = sum of x[r, m] over all m

    All arrays are in registers. `minuend`, `factor`, `x` and y are [64, C]; `start` and sums are [64]. If `factor` is
    None, it counts as 1.

    In the attention kernels, y is log2 of the attention weights. There, beta is the sigmoid of the logits, `minuend` is
    log2(beta), `x` is the log-decay of each key, -log2(1 - beta), and `start` is the sum of the log-decays of the keys
    to the right of this tile.

    To save registers, the GPU body subtracts each sum over m > c as soon as it has computed the sum.
    """
    if is_interpreted():
        total = jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1]
        before = start[:, None] + jnp.pad(total[:, 1:], ((0, 0), (0, 1)))
        return minuend - (before if factor is None else factor * before), total[:, 0]
    return _scan(minuend, factor, x, start, right=True)


def minus_sum_left(minuend, factor, x, start):
    """Subtract from each element of `minuend` the sum of `x` over the columns to its left. Return (y, sums).

      y[r, c] = minuend[r, c] - factor[r, c] * (start[r] + sum of x[r, m] over m < c)
      sums[r] = sum of x[r, m] over all m

    All arrays are in registers. `minuend`, `factor`, `x` and y are [64, C]; `start` and sums are [64]. If `factor` is
    None, it counts as 1.

    In the backward attention kernels, y is the gradient of the logits. There, A are the attention weights, dA are their
    gradients, beta is the sigmoid of the logits, `x` is A * dA, `minuend` is (1 - beta) * A * dA, and `factor` is beta.
    `start` is the sum of A * dA over the keys to the left of this tile, plus the gradient of log_rem. log_rem is the
    logarithm of the part of the stick that remains after all keys.
    """
    if is_interpreted():
        total = jnp.cumsum(x, axis=1)
        before = start[:, None] + jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
        return minuend - (before if factor is None else factor * before), total[:, -1]
    return _scan(minuend, factor, x, start, right=False)


def _like(x, registers):
    """Return a new Mosaic array in registers, with the register layout of the Mosaic array `x`.

    `registers` has the MLIR values of the new array, one for each register of this thread.
    """
    from jax.experimental.mosaic.gpu import FragmentedArray

    return FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


class _GpuThread:
    """Arithmetic in one GPU thread. Each function emits MLIR operations into the kernel.

    Tests replace this class with arithmetic on NumPy arrays that have one number for every thread.
    """

    def __init__(self):
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, gpu, math, vector
        from jax.experimental.mosaic.gpu import utils

        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        thread = arith.index_castui(i32, gpu.thread_id(gpu.Dimension.x))

        def one_if(bit, is_set):
            compare = arith.CmpIPredicate.ne if is_set else arith.CmpIPredicate.eq
            chosen = arith.cmpi(compare, arith.andi(thread, utils.c(bit, i32)), utils.c(0, i32))
            return arith.select(chosen, utils.c(1.0, f32), utils.c(0.0, f32))

        self.add, self.subtract, self.negate, self.fma = arith.addf, arith.subf, arith.negf, math.fma
        self.shuffle, self.one_if, self.zero = utils.shfl_bfly, one_if, utils.c(0.0, f32)
        self.element = lambda register, i: vector.extract(register, [], [i])
        self.pack = lambda elements, like: vector.from_elements(like.type, elements)


def scan_registers(ops, minuend, factor, x, start, *, right: bool):
    """Compute the part of one thread in `minus_sum_right` (if `right`) or `minus_sum_left`. Return its (y, sums).

    The thread holds elements of two rows. In each row, it holds two neighbouring elements of every group of 8 columns.
    The arguments are NumPy arrays of its registers:

    `minuend`, `factor`, `x`: [1, groups, 1, 1, 2 rows, ..]. A register has the two elements of one group in one row.
    `start`: [1, 1, 2 rows, ..]. A register has the value of one row.

    y has the shape of `x`, and sums has the shape of `start`. `ops`, a `_GpuThread`, computes with registers. For each
    group and row, the thread exchanges two sums with the other threads of its quad (four neighbouring threads).
    """
    # `near` and `far` are for the partner threads, whose index differs from this thread's index in bit 0 or in bit 1.
    # They are 1 if the columns of the partner are summed before the columns of this thread, else 0.
    near, far = (ops.one_if(bit, is_set=not right) for bit in (1, 2))
    result, sums = x.copy(), start.copy()
    for half in range(2):
        row_index = (0, 0, half) + (0,) * (start.ndim - 3)
        running, total = ops.element(start[row_index], 0), ops.zero
        groups = range(x.shape[1])
        for g in reversed(groups) if right else groups:
            index = (0, g, 0, 0, half) + (0,) * (x.ndim - 5)
            a, b = (ops.element(x[index], i) for i in range(2))
            pair = ops.add(a, b)
            partner = ops.shuffle(pair, 1)
            both = ops.add(pair, partner)
            others = ops.shuffle(both, 2)
            base = ops.fma(others, far, ops.fma(partner, near, running))
            before = (ops.add(base, b), base) if right else (base, ops.add(base, a))
            outs = []
            for i in range(2):
                own = ops.element(minuend[index], i)
                if factor is None:
                    outs.append(ops.subtract(own, before[i]))
                else:
                    outs.append(ops.fma(ops.negate(ops.element(factor[index], i)), before[i], own))
            result[index] = ops.pack(outs, x[index])
            group = ops.add(both, others)
            running, total = ops.add(running, group), ops.add(total, group)
        sums[row_index] = ops.pack([total], start[row_index])
    return result, sums


def _scan(minuend, factor, x, start, *, right: bool):
    """Compute `minus_sum_right` (if `right`) or `minus_sum_left` on a GPU. Return (y, sums) as these functions do."""
    arrays = (x, minuend) if factor is None else (x, minuend, factor)

    @plgpu.inline_mgpu(
        arg_types=(ROW,) + (TILE,) * len(arrays),
        return_type=(
            plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=TILE),
            plgpu.ShapeDtypeStruct((x.shape[0],), jnp.float32, layout=ROW),
        ),
    )
    def scan(ctx, start, x, minuend, factor=None):
        registers = None if factor is None else factor.registers
        result, sums = scan_registers(
            _GpuThread(), minuend.registers, registers, x.registers, start.registers, right=right
        )
        return _like(x, result), _like(start, sums)

    return scan(start, *arrays)
