"""The PTX machine: it executes the PTX of compiled GPU kernels on a CPU, in NumPy. See docs/design/ptx_machine.md.

capture.py and capture_triton.py find the kernels of a JAX function. compiled.py and host.py turn a kernel into a
`Program` (program.py). A `Program` has the PTX of the kernel, and says how the kernel is launched. machine.py runs a
program. The other files are parts of the machine.
"""

import importlib.util

HAS_WHEELS = importlib.util.find_spec("jax_cuda13_plugin") is not None
