"""How fast the ops and the training step are, against limits and peers of the same run: `python -m benchmarks`."""
