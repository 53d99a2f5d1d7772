"""Train a model: the training loop, the jitted step, the optimizer, muP, the metrics, and the display of a run."""
