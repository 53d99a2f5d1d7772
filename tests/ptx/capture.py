"""Run a JAX function on a CPU, with the PTX of its Mosaic GPU kernels.

The kernels are compiled to PTX for a Hopper GPU, and this PTX is executed on the CPU. XLA's CPU code computes
everything between the kernels.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platform

from .compiled import compile_kernel
from .program import Program


def run(function: Callable, *arrays, launch: Callable | None = None, program_of: Callable = compile_kernel):
    """Return function(*arrays), computed on the CPU; the function is traced as for a Hopper GPU.

    Args:
      function: a function of pytrees of arrays, which may contain Mosaic kernels.
      launch: a function (program, arrays) that runs a kernel. `arrays` has the inputs of the kernel, and after them its
        outputs, which `launch` writes in place. None: `machine.launch`.
      program_of: a function that turns an MLIR module of Mosaic GPU into a Program.
    """
    if launch is None:
        from .machine import launch
    with kernels_launched_by(launch, program_of):
        return jax.block_until_ready(jax.jit(lambda *arguments: function(*arguments))(*arrays))


def programs(function: Callable, *arrays) -> list[Program]:
    """Return the different Mosaic kernels of a function as Programs, in the order in which they are lowered.

    `function` is traced for arrays with the shapes and types of `arrays`; nothing runs.
    """
    with kernels_launched_by(lambda *_: None) as found:
        jax.jit(lambda *arguments: function(*arguments)).trace(*arrays).lower()
    return list({program.ptx: program for program in found}.values())


@contextlib.contextmanager
def kernels_launched_by(launch: Callable, program_of: Callable = compile_kernel) -> Iterator[list[Program]]:
    """Inside this context, compile functions as for a Hopper GPU, and run their Mosaic kernels by `launch`.

    The list that is yielded receives the Program of every kernel that is lowered. At the end, the context raises the
    first error that `launch` has raised. `launch` and `program_of` have the same meaning as in `run`.
    """
    from jax._src.pallas import mpmd
    from jax._src.pallas.mosaic_gpu import pallas_call_registration as registration
    from jax.experimental.mosaic.gpu import core

    host, found = Host(launch), []

    def lower(ctx, *arguments, jaxprs, **parameters):
        def call(ctx, *arguments, module, input_output_aliases=(), **_):
            if input_output_aliases:
                raise NotImplementedError("the PTX machine does not support kernels whose inputs are also outputs")
            program = program_of(module)._replace(barriers=barrier_names(jaxprs[0]))
            found.append(program)
            return host.call(ctx, program, *arguments)

        with mock.patch.object(core, "_mosaic_gpu_lowering_rule", call):
            return registration.mpmd_map_mgpu_lowering_rule(ctx, *arguments, jaxprs=jaxprs, **parameters)

    with platform.absent_gpu(), mock.patch.object(mpmd, "_mpmd_map_fallback_lowering", lower):
        try:
            yield found
        finally:  # an error of a launch comes first: an error in the body may only be its consequence
            host.raise_error()


class Host:
    """Launches programs from inside XLA's CPU code, by a callback.

    A `Host` keeps the exceptions of the launches, because XLA would turn them into text.
    """

    def __init__(self, launch: Callable):
        self.launch, self.errors, self.one_at_a_time = launch, [], threading.Lock()

    def call(self, ctx, program: Program, *arguments):
        """Emit the code of a callback that launches `program`, in a lowering rule for a kernel call.

        `ctx` and `arguments` are the arguments of the lowering rule. Return the MLIR values of the kernel's outputs.
        """
        from jax._src.interpreters import mlir

        outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ctx.avals_out]

        def on_host(*inputs):
            results = [_poisoned(x) for x in outputs]
            with self.one_at_a_time:
                if not self.errors:
                    try:
                        self.launch(program, [*map(np.array, inputs), *results])
                    except Exception as error:
                        self.errors.append(error)
            return results

        return mlir.lower_fun(lambda *inputs: jax.pure_callback(on_host, outputs, *inputs))(ctx, *arguments)

    def raise_error(self) -> None:
        """Raise the first error of all launches, if there was one."""
        if self.errors:
            raise self.errors[0]


def _poisoned(x) -> np.ndarray:
    """Return an output array of x's shape and type that is full of NaN or, for integers, of 99.

    So an element that the kernel does not write is not mistaken for a result.
    """
    return np.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 99, x.dtype)


def barrier_names(kernel) -> tuple[str, ...]:
    """Return the names of a kernel's mbarriers, in the order in which the compiled kernel initialises them.

    `kernel` is the jaxpr of the kernel. Its barriers of the same type and size form a group. The compiled kernel
    initialises one group after the other. The groups are in the order of their first barriers in the jaxpr. Within a
    group, the barriers are initialised in the reverse order of the jaxpr.
    """
    from jax._src.pallas.mosaic_gpu import core

    groups: dict[object, list[list[str]]] = {}
    for equation in kernel.eqns:
        if equation.primitive.name != "run_scoped":
            continue
        scope = equation.params["jaxpr"]
        names = scope.debug_info.safe_arg_names(len(scope.invars))
        for name, variable in zip(names, scope.invars, strict=True):
            aval = variable.aval
            if isinstance(aval.dtype, core.BarrierType):
                parts = [f"{name}[{i}]" for i in range(aval.size)] if aval.shape else [name]
                groups.setdefault((aval.dtype, aval.size), []).insert(0, parts)
    return tuple(part for group in groups.values() for parts in group for part in parts)
