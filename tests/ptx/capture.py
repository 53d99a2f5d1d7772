"""Run JAX functions on a CPU and execute their Mosaic GPU kernels as the PTX that a Hopper GPU would run.

XLA's CPU code computes everything between the kernels.
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
    """Return function(*arrays), traced as for a Hopper GPU.

    Args:
      function: a function of pytrees of arrays.
      launch: a function of a program and the arrays of a kernel, inputs before outputs. It writes the outputs in place.
        None: `machine.launch`.
      program_of: a function that returns the Program of an MLIR module of Mosaic GPU.
    """
    if launch is None:
        from .machine import launch
    with kernels_launched_by(launch, program_of):
        return jax.block_until_ready(jax.jit(lambda *arguments: function(*arguments))(*arrays))


def programs(function: Callable, *arrays) -> list[Program]:
    """Return the distinct Mosaic kernels of a function, in the order in which they are lowered. Nothing runs."""
    with kernels_launched_by(lambda *_: None) as found:
        jax.jit(lambda *arguments: function(*arguments)).trace(*arrays).lower()
    return list({program.ptx: program for program in found}.values())


@contextlib.contextmanager
def kernels_launched_by(launch: Callable, program_of: Callable = compile_kernel) -> Iterator[list[Program]]:
    """Let functions that are compiled inside this context see a Hopper GPU, and call `launch` for their Mosaic kernels.

    The yielded list receives the program of every kernel that is lowered. The first error that `launch` raises is
    raised again at the end of the context.
    """
    from jax._src.pallas import mpmd
    from jax._src.pallas.mosaic_gpu import pallas_call_registration as registration
    from jax.experimental.mosaic.gpu import core

    host, found = Host(launch), []

    def lower(ctx, *arguments, jaxprs, **parameters):
        def call(ctx, *arguments, module, input_output_aliases=(), **_):
            if input_output_aliases:
                raise NotImplementedError("kernels with inputs that are outputs too")
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
    """Launches programs from inside XLA's code. It keeps their exceptions, which XLA would turn into a text."""

    def __init__(self, launch: Callable):
        self.launch, self.errors, self.one_at_a_time = launch, [], threading.Lock()

    def call(self, ctx, program: Program, *arguments):
        """Emit a call of the host for a lowering rule, instead of the call of a kernel on the GPU."""
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
        """Raise the first error of the launches, if there was one."""
        if self.errors:
            raise self.errors[0]


def _poisoned(x) -> np.ndarray:
    """Return an output array of NaN or, for integers, 99, so that an unwritten element does not look like a result."""
    return np.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 99, x.dtype)


def barrier_names(kernel) -> tuple[str, ...]:
    """Return the names of a kernel's mbarriers in the order in which the kernel initialises them.

    `kernel` is a jaxpr. Equal barriers form one group at the place of the first of them, in reverse order.
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
