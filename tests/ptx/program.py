"""What a launch of a GPU kernel consists of: its PTX, its grid, and where its parameters come from."""

from typing import NamedTuple


class TensorMap(NamedTuple):
    """What the copy engine knows about an array. Dimensions are ordered from the innermost to the outermost."""

    array: int  # the array's place among the arrays of the launch
    offset: int  # of the first element, in bytes
    itemsize: int
    sizes: tuple[int, ...]  # in elements; elements beyond them read as zero and are not written
    strides: tuple[int, ...]  # in bytes; the first is `itemsize`
    box: tuple[int, ...]  # elements that one copy moves along each dimension
    swizzle: int  # 32, 64 or 128 bytes, or 16 for none


class Program(NamedTuple):
    """One kernel and how it is launched."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    # In the order of the PTX: the place of an array, an integer or float as its bytes, or the tensor maps of a block of
    # memory, 128 bytes each.
    parameters: tuple[int | bytes | tuple[TensorMap, ...], ...]
    barriers: tuple[str, ...] = ()  # names of the mbarriers, in the order in which the kernel initialises them
