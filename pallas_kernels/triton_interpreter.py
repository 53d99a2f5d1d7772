"""Run Triton kernels on the CPU in Triton's own interpreter, on NumPy arrays and with the rounding of a GPU."""

import contextlib
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

_one_at_a_time = threading.Lock()  # the interpreter keeps its position in the grid in a global variable
_NAMES = {"f": "fp", "i": "i", "u": "u", "b": "i"}


class _Tensor:
    """A NumPy array with the methods that Triton's interpreter calls on a torch tensor. The array is not copied."""

    def __init__(self, array: np.ndarray):
        bits = 1 if array.dtype == bool else 8 * array.dtype.itemsize
        self.array, self.dtype = array, "bf16" if array.dtype == jnp.bfloat16 else f"{_NAMES[array.dtype.kind]}{bits}"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    untyped_storage = cpu = lambda self: self
    new_empty = lambda self, *shape, device: _Tensor(self.array)  # noqa: E731
    storage_offset = size = stride = lambda self: 0
    set_ = copy_ = lambda self, *_: None


@contextlib.contextmanager
def _language_patched_once() -> Iterator[None]:
    """In this context, Triton's interpreter patches the Triton language only once for each Python module.

    Without this context, the interpreter would patch the language at every call of a `triton.jit` function, which is
    slow.
    """
    from triton.language import tensor
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, set()

    def once(function):
        module = id(function.__globals__)
        if module not in seen:
            seen.add(module)
            scope = patch(function)
            # Triton 3.6 passes an array [1] to NumPy, where NumPy 2.4 and newer require a number. This change is undone
            # with the rest of the patch.
            tensor.__index__ = lambda self: int(self.handle.data.item())
            return scope

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


@contextlib.contextmanager
def _bfloat16_as_on_a_gpu() -> Iterator[None]:
    """In this context, Triton's interpreter computes with bfloat16 numbers and rounds them as a GPU does.

    The interpreter stores the bits of a bfloat16 number as an integer. Without this context, it would truncate float32
    numbers to bfloat16, and it would multiply and add these integers. In this context, it computes with the values of
    the numbers. The results of matrix products are float32 and are not rounded to bfloat16. The result of any other
    arithmetic operation is rounded to the nearest bfloat16 number.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    cast, dot, binary = Builder.cast_impl, Builder.create_dot, Builder.binary_op

    def widened(x):
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle(x.data.view(jnp.bfloat16).astype(np.float32), float32)

    def rounded(x):
        return TensorHandle(x.data.astype(jnp.bfloat16).view(np.uint16), bfloat16)

    def cast_rounded(self, x, dtype):
        if dtype.scalar == bfloat16:
            return rounded(cast(self, widened(x), float32))
        return cast(self, widened(x), dtype)

    def dot_of_values(self, a, b, *arguments):
        return dot(self, widened(a), widened(b), *arguments)

    def binary_rounded(self, x, y, operation):
        result = binary(self, widened(x), widened(y), operation)
        is_number = x.dtype.scalar == bfloat16 and result.data.dtype == np.float32  # a comparison gives truth values
        return rounded(result) if is_number else result

    Builder.cast_impl, Builder.create_dot, Builder.binary_op = cast_rounded, dot_of_values, binary_rounded
    try:
        yield
    finally:
        Builder.cast_impl, Builder.create_dot, Builder.binary_op = cast, dot, binary


def run(kernel, *arrays, out, grid, constants, **_):
    """Run a Triton kernel on the CPU in Triton's interpreter, and return its outputs.

    `triton_call.launch` calls this function, and explains the arguments. `num_warps` and `num_stages` have no effect.
    """
    leaves, tree = jax.tree.flatten(out)

    def call(*arrays):
        inputs = [np.ascontiguousarray(x) for x in arrays]
        # An element that the kernel does not write must not look like a result.
        outputs = [np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 99, x.dtype) for x in leaves]
        with _one_at_a_time, _language_patched_once(), _bfloat16_as_on_a_gpu():
            kernel()[grid](*map(_Tensor, [*inputs, *outputs]), **constants)
        return outputs

    return jax.tree.unflatten(tree, jax.pure_callback(call, leaves, *arrays))
