"""Checksums of files and of arrays. The checksum of an array is computed on the devices, without a copy to the host."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp


def checksum(array) -> int:
    """Return a checksum of the bits of an array: an integer from 0 to 2^32 - 1, which does not depend on the sharding.

    The checksum is a sum over all devices of the array. This function waits until the sum is done, so that two sums
    never run at the same time. On a CPU with several virtual devices, the threads of two sums could wait for each other
    forever.
    """
    return int(_mixed_sum(array))


@jax.jit
def _mixed_sum(array):
    """Compute a checksum of an array: sum_i mix(bits_i + i * 0x9E3779B9) mod 2^32.

    i is the position of an element in row-major order, bits_i are the bits of element i as an integer, and mix is the
    last step of the hash function MurmurHash3. An element of 64 bits counts as two elements. A sum of integers does not
    depend on the order of its terms, so the checksum is the same for every sharding. mix is one-to-one, so a change of
    one element always changes the checksum. Without mix, a change of the highest bits (the signs) of two elements would
    not change the checksum.
    """
    array = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = jax.lax.bitcast_convert_type(array, f"uint{min(32, 8 * array.dtype.itemsize)}").astype(jnp.uint32)
    x, stride = bits, 0x9E3779B9
    for axis in reversed(range(bits.ndim)):
        x += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
        stride = stride * bits.shape[axis] % 2**32
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(x ^ (x >> 16), dtype=jnp.uint32)


def crc32_of(path: Path) -> int:
    """Return the crc32 checksum of a file. The file is read in blocks, so it may be larger than the memory."""
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc32 = zlib.crc32(block, crc32)
    return crc32
