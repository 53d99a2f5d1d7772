"""The data of a kernel launch: the PTX, the grid, and where the parameters come from."""

from typing import NamedTuple


class TensorMap(NamedTuple):
    """The description of an array for the copy engine, which copies a part of the array (a box) at a time.

    In `sizes`, `strides` and `box`, the innermost dimension comes first.
    """

    array: int  # the index of the array among the arrays of the launch
    offset: int  # the offset of the first element, in bytes
    itemsize: int
    sizes: tuple[int, ...]  # in elements; elements beyond them read as zero and are not written
    strides: tuple[int, ...]  # in bytes; the first is `itemsize`
    box: tuple[int, ...]  # elements that one copy moves along each dimension
    swizzle: int  # 32, 64 or 128 bytes; 16 means no swizzle


class Program(NamedTuple):
    """One compiled kernel, and how it is launched."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    # One entry per parameter of the PTX: the index of an array, the bytes of an integer or float, or the tensor maps of
    # a block of memory, 128 bytes each.
    parameters: tuple[int | bytes | tuple[TensorMap, ...], ...]
    barriers: tuple[str, ...] = ()  # names of the mbarriers, in the order in which the kernel initialises them
