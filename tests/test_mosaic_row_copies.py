"""Test `mosaic_row_copies`, which copies rows with given indices between global and shared memory.

The expert kernels use these copies. The functions have one body for the interpreter, which the tests run, and one for
the GPU, whose addresses the tests compute in NumPy.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import mosaic_row_copies, platform


def move(x, source_rows, target_rows, out_rows: int, columns: int = 64):
    """Copy rows of x through shared memory to rows of a new array with `out_rows` rows.

    For each i, row source_rows[i] of x becomes row target_rows[i] of the result. If source_rows[i] is -1, row
    target_rows[i] of the result becomes zeros. If target_rows[i] is -1, nothing is written for this i. Rows of the
    result that are never written are NaN. A thread block copies 64 rows, and `columns` columns of these at a time.
    """
    blocks = source_rows.shape[0] // 64

    def kernel(x_ref, source_ref, target_ref, out_ref, tile):
        rows = pl.ds(lax.axis_index("block") * 64, 64)

        def one(i, _):
            column = i * columns
            mosaic_row_copies.gather(x_ref, source_ref.at[rows], column, tile)
            mosaic_row_copies.gather_commit()
            mosaic_row_copies.gather_wait(0)
            mosaic_row_copies.scatter(tile, target_ref.at[rows], column, out_ref)
            plgpu.commit_smem()

        lax.fori_loop(0, -(-x.shape[1] // columns), one, None)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((out_rows, x.shape[1]), x.dtype),
        scratch_types=(plgpu.SMEM((64, columns), x.dtype, transforms=mosaic_row_copies.atoms(x.dtype)),),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return run(x, source_rows, target_rows)


@pytest.mark.parametrize("width", [64, 72, 136])
def test_rows_move(width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((50, width)), jnp.bfloat16)
    source = rng.integers(0, 50, 128)
    source[[3, 70]] = -1
    target = rng.permutation(140)[:128]
    target[[5, 127]] = -1
    with platform.interpret(detect_races=True):
        out = jax.jit(lambda *a: move(*a, 140, 128 if width == 136 else 64))(x, *map(jnp.int32, (source, target)))
    want = np.full((140, width), np.nan, np.float32)
    kept = target >= 0
    want[target[kept]] = np.where(source[:, None] < 0, 0, np.asarray(x, np.float32)[source])[kept]
    np.testing.assert_array_equal(np.asarray(out, np.float32), want)


class Numbers:
    """The integer operations that `mosaic_row_copies.chunks` needs, in NumPy. `thread` has all threads at once."""

    thread = np.arange(mosaic_row_copies.THREADS)
    add, multiply, exclusive_or = staticmethod(np.add), staticmethod(np.multiply), staticmethod(np.bitwise_xor)
    divide, remainder = staticmethod(np.floor_divide), staticmethod(np.remainder)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows, columns", [(64, 64), (64, 128), (128, 64), (16, 256)])
def test_every_chunk_is_copied_once_to_where_the_tensor_cores_read_it(rows, columns, itemsize):
    """Each 16-byte chunk of a tile is copied exactly once, to the swizzled address at which the tensor cores read it.

    With a swizzle of 128 bytes, bits 4 to 6 of an address are XORed with bits 7 to 9.
    """
    seen = {}
    first, steps = mosaic_row_copies.chunks(Numbers, rows, columns, itemsize)
    for step in steps:
        for r, c, b in zip(*(x + further for x, further in zip(first, step, strict=True)), strict=True):
            assert (r, c) not in seen
            seen[int(r), int(c)] = int(b)
    assert len(seen) == rows * columns * itemsize // 16
    per_atom = 128 // itemsize
    for (r, c), byte in seen.items():
        atom = r // 8 * (columns // per_atom) + c // per_atom
        plain = atom * 1024 + r % 8 * 128 + c % per_atom * itemsize
        assert byte == plain ^ (plain >> 7 & 7) << 4
