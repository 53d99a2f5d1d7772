"""Benchmarks of the ops and of the training step: `python -m benchmarks`.

Every time is compared with the hardware's limits and with other implementations, measured in the same run.
"""
