"""Benchmarks of the ops and of the training step: `python -m benchmarks`.

Every time is compared with the limits of the hardware and with the times of other implementations. The limits and all
times are measured in the same run.
"""
