"""Copies of single rows between an array in global memory and a tile in shared memory, for the ScatterMoE kernels.

The rows of one expert may be anywhere in the array. So for every row of a tile, the kernel has the index of this row in
the array: its row number. Hopper's copy engine copies only consecutive rows. So the threads of a warpgroup copy single
rows, in chunks of 16 bytes. Each of these copies has a GPU body and an interpreter body: code for a GPU, and code for
the Mosaic GPU interpreter. docs/design/expert_kernels.md explains the barriers around these copies.

In shared memory, a tile has the layout that the tensor cores read. It consists of atoms of 8 rows x 128 bytes. The
atoms are stored one after the other, from left to right and then from top to bottom. A row of an atom has 8 chunks. In
an atom, chunk c of row r is stored at position c XOR r of the row (a swizzle); c and r are from 0 to 7.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from . import platform

CHUNK = 16  # bytes
ATOM = 8, 128  # rows, bytes
THREADS = 128  # of a warpgroup


def atoms(dtype) -> tuple:
    """Return the Pallas transforms that give a tile in shared memory the layout that tensor cores read.

    `dtype` is the type of the elements. The tile consists of atoms of 8 rows x 128 bytes. A chunk has 16 bytes. In an
    atom, chunk c of row r is stored at position c XOR r of the row (a swizzle).
    """
    return plgpu.TilingTransform((ATOM[0], ATOM[1] // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(ATOM[1])


def chunks(ops, rows: int, columns: int, itemsize: int):
    """Return the positions of the chunks that one thread copies, when a warpgroup copies a tile [rows, columns].

    A chunk has 16 bytes, and an element has `itemsize` bytes. The tile is in shared memory. Each of the 128 threads of
    the warpgroup copies some of the chunks. The result is (first, distances):

    `first`: the position of the first chunk of the thread: (row, column, byte). Here, row and column are indices in the
      tile, and byte is the offset from the start of the tile in shared memory. The position depends on the thread,
      so `ops`, a `_Thread`, computes it in the kernel.
    `distances`: a list of (rows, columns, bytes), with one entry for every chunk of the thread: the position of this
      chunk minus `first`. The first entry is (0, 0, 0). The entries are Python numbers, because they are equal in all
      threads.
    """
    per_atom, across = ATOM[1] // CHUNK, columns * itemsize // ATOM[1]
    chunk, row = ops.remainder(ops.thread, per_atom), ops.divide(ops.thread, per_atom)
    row_of_atom, down = ops.remainder(row, ATOM[0]), ops.divide(row, ATOM[0])
    in_atom = ops.add(ops.multiply(row_of_atom, ATOM[1]), ops.multiply(ops.exclusive_or(chunk, row_of_atom), CHUNK))
    byte = ops.add(in_atom, ops.multiply(down, across * ATOM[0] * ATOM[1]))
    at_once = THREADS // per_atom  # 16 rows: the 128 threads copy 16 rows x 8 chunks at once
    steps = [
        (first, atom * ATOM[1] // itemsize, (first // ATOM[0] * across + atom) * ATOM[0] * ATOM[1])
        for first in range(0, rows, at_once)
        for atom in range(across)
    ]
    return (row, ops.multiply(chunk, CHUNK // itemsize), byte), steps


def gather(source, rows, column, tile) -> None:
    """Start to copy rows of an array into a tile in shared memory: tile[r] = source[rows[r], column : column + C].

    If rows[r] is negative, row r of the tile becomes zero. Columns of the tile beyond the last column of `source`
    become zero too. This function does not wait for the copies. To wait for them, call `gather_commit`, and then
    `gather_wait`.

    Args:
      source: reference to an array [R, D] in global memory. D elements take a multiple of 16 bytes.
      rows: reference to the row numbers in `source`, int32 [M] in global memory.
      column: the first column to copy, a multiple of 8.
      tile: reference to a tile [M, C] in shared memory with the layout of `atoms`. C elements take a multiple of 128
        bytes.
    """
    if platform.is_interpreted():
        tile[...] = _read_rows(source, rows, column, tile.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SCALAR, plgpu.RefType(atoms(source.dtype))))
    def copy(ctx, source, rows, column, tile):
        for thread in _copies(source, rows, column, tile):
            bytes_read = thread.select(thread.inside, CHUNK, 0)  # bytes of the chunk that are not read become zero
            ptx = f"cp.async.cg.shared.global [$0 + {thread.step}], [$1], 16, $2;"
            thread.asm(ptx, "r,l,r", thread.shared, thread.far, bytes_read)

    copy(source, rows, column, tile)


def gather_commit() -> None:
    """Put all copies that this warpgroup started with `gather` since the previous `gather_commit` into one group.

    `gather_wait` waits for such groups.
    """
    _asm("cp.async.commit_group;")


def gather_wait(pending: int) -> None:
    """Wait until all groups of copies that this warpgroup started are done, except the newest `pending` groups.

    `gather` starts copies, and `gather_commit` puts them into a group. After the wait, tensor cores can read the copied
    rows. The copies (`cp.async`) and the tensor cores use two different paths to shared memory. So this function calls
    `commit_smem`, a fence between the two paths.
    """
    _asm(f"cp.async.wait_group {pending};")
    plgpu.commit_smem()


def scatter(tile, rows, column, target) -> None:
    """Copy the rows of a tile in shared memory to rows of an array: target[rows[r], column : column + C] = tile[r].

    If rows[r] is negative, row r of the tile is not written. Nothing is written beyond the last column of `target`. A
    thread copies chunks that other threads wrote. So the warpgroup needs a barrier (`plgpu.commit_smem`) before this
    call, and a second barrier before it overwrites the tile.

    Args:
      tile: reference to a tile [M, C] in shared memory with the layout of `atoms`. C elements take a multiple of 128
        bytes.
      rows: reference to the row numbers in `target`, int32 [M] in global memory.
      column: the first column to write, a multiple of 8.
      target: reference to an array [R, D] in global memory. D elements take a multiple of 16 bytes.
    """
    if platform.is_interpreted():
        _write_rows(tile, rows, column, target)
        return

    ptx = (
        "{{ .reg .pred p; .reg .b32 a, b, c, d; setp.ne.b32 p, $2, 0; ld.shared.v4.b32 {{a, b, c, d}}, [$0 + {step}];"
        " @p st.global.v4.b32 [$1], {{a, b, c, d}}; }}"
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(atoms(tile.dtype)), plgpu.RefType(), _SCALAR, plgpu.RefType()))
    def copy(ctx, tile, rows, column, target):
        for thread in _copies(target, rows, column, tile):
            inside = thread.select(thread.inside, 1, 0)
            thread.asm(ptx.format(step=thread.step), "r,l,r", thread.shared, thread.far, inside)

    copy(tile, rows, column, target)


_SCALAR = plgpu.Layout.WG_SPLAT


def _read_rows(source, rows, column, shape):
    """Return a tile [M, C] whose row r is source[rows[r], column : column + C]: the interpreter body of `gather`.

    `source` [R, D] and `rows` [M] are references to global memory, and `shape` is (M, C). If rows[r] is negative, row r
    of the tile is zero. Every access to a reference is slow in the interpreter. So one access reads all of `source`,
    and another one reads all of `rows`.
    """
    numbers = rows[...]
    there = source[...][jnp.maximum(numbers, 0)]
    there = lax.dynamic_slice(jnp.pad(there, ((0, 0), (0, shape[1]))), (0, column), shape)
    return jnp.where((numbers < 0)[:, None], 0, there)


def _write_rows(tile, rows, column, target) -> None:
    """Set target[rows[r], column : column + C] = tile[r] for every row r: the interpreter body of `scatter`.

    `tile` [M, C] is a reference to shared memory; `rows` [M] and `target` [R, D] are references to global memory. If
    rows[r] is negative, row r of the tile is not written. `plgpu.copy_smem_to_gmem` copies one row at a time, and
    writes nothing beyond the last column of `target`.
    """
    numbers = rows[...]

    def one(r, _):
        row = lax.dynamic_index_in_dim(numbers, r, keepdims=False)

        @pl.when(row >= 0)
        def _():
            plgpu.copy_smem_to_gmem(tile.at[r], target.at[row, pl.ds(column, tile.shape[1])])

    lax.fori_loop(0, tile.shape[0], one, None)
    plgpu.wait_smem_to_gmem(0)


def _asm(text: str) -> None:
    """Run the PTX instruction `text` in every thread of the warpgroup. In the interpreter, do nothing.

    The instruction must not have registers as operands. It may have numbers, which are written in `text`.
    """
    if platform.is_interpreted():
        return

    @plgpu.inline_mgpu()
    def run(ctx):
        _Thread.asm(text, "")

    run()


class _Thread:
    """Integer arithmetic in one GPU thread. Each function emits an MLIR operation into the kernel.

    Tests replace this class with arithmetic on NumPy arrays that have one number for every thread.
    """

    def __init__(self):
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, gpu
        from jax.experimental.mosaic.gpu import utils

        i32 = ir.IntegerType.get_signless(32)
        self.constant = lambda x: utils.c(x, i32) if isinstance(x, int) else x

        def of(operation):
            return lambda a, b: operation(self.constant(a), self.constant(b))

        self.add, self.multiply, self.exclusive_or = of(arith.addi), of(arith.muli), of(arith.xori)
        self.divide, self.remainder = of(arith.divui), of(arith.remui)
        self.thread = self.remainder(arith.index_castui(i32, gpu.thread_id(gpu.Dimension.x)), THREADS)
        self.select = lambda condition, a, b: arith.select(condition, self.constant(a), self.constant(b))

    @staticmethod
    def asm(text, constraints, *operands):
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import llvm

        llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def _copies(array, rows, column, tile):
    """Yield the addresses of every chunk of 16 bytes that one thread copies between `array` and `tile`.

    `array` [R, D] and the row numbers `rows`, int32 [M], are in global memory. `tile` [M, C] is in shared memory. Row r
    of the tile corresponds to array[rows[r], column : column + C]. For each chunk, this function yields a
    `_Thread` object with four attributes:

    `shared`, `step`: their sum is the address of the chunk in shared memory. `step` is a Python number of bytes.
    `far`: the address of the chunk in global memory.
    `inside`: whether the chunk is inside `array`: its row number is not negative, and its first column is less than D.

    The same object is yielded for every chunk. So read its attributes before you ask for the next chunk.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    thread = _Thread()
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    _, width = ir.MemRefType(array.type).shape
    itemsize = utils.bitwidth(ir.MemRefType(array.type).element_type) // 8
    groups, across = ir.MemRefType(tile.type).shape[:2]
    near, far, numbers = (llvm.ptrtoint(t, utils.memref_ptr(x)) for x, t in ((tile, i32), (array, i64), (rows, i64)))
    (row, chunk_column, byte), steps = chunks(thread, groups * ATOM[0], across * ATOM[1] // itemsize, itemsize)
    thread.shared = thread.add(near, byte)
    column = thread.add(column.registers.item(), chunk_column)
    numbers = arith.addi(numbers, arith.extui(i64, thread.multiply(row, 4)))
    less, not_negative = arith.CmpIPredicate.slt, arith.CmpIPredicate.sge
    number, loaded_for = None, None
    for rows_down, columns, thread.step in steps:
        if rows_down != loaded_for:
            at = llvm.inttoptr(llvm.PointerType.get(1), arith.addi(numbers, utils.c(4 * rows_down, i64)))
            number, loaded_for = llvm.load(i32, at), rows_down
        own, exists = thread.add(column, columns), arith.cmpi(not_negative, number, thread.constant(0))
        thread.inside = arith.andi(exists, arith.cmpi(less, own, thread.constant(width)))
        # The offset has 64 bits: an array with a row for every (token, choice) pair may have 2^32 bytes or more.
        offset = arith.muli(arith.extui(i64, thread.select(exists, number, 0)), utils.c(width * itemsize, i64))
        offset = arith.addi(offset, arith.extui(i64, thread.multiply(thread.select(thread.inside, own, 0), itemsize)))
        thread.far = arith.addi(far, offset)
        yield thread
