"""Benchmarks of the ops and of the training step. `python -m benchmarks` runs them.

Every time is compared with the times of other implementations, and with the least time that the hardware permits. The
least time is computed from the speed of the machine, which the benchmarks measure too.
"""
