"""A machine that executes, on a CPU, the PTX that a GPU would: see docs/design/ptx_machine.md.

capture.py takes the kernels out of a JAX function, compiled.py and host.py find out what a GPU would be given,
program.py says what that is, and machine.py runs it. The other files are the parts of the machine.
"""

import importlib.util

HAS_WHEELS = importlib.util.find_spec("jax_cuda13_plugin") is not None
