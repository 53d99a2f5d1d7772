"""Training: the loop, the step, the optimizer, muP, the metrics, and the display of a run."""
