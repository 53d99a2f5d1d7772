"""The PTX machine: it executes on a CPU, in NumPy, the PTX of GPU kernels. See docs/design/ptx_machine.md.

capture.py takes the kernels out of a JAX function. compiled.py and host.py find the PTX of a kernel and the way it is
launched, as a `Program` of program.py. machine.py runs a program. The other files are the parts of the machine.
"""

import importlib.util

HAS_WHEELS = importlib.util.find_spec("jax_cuda13_plugin") is not None
