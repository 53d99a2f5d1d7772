"""Training: the loop, the step, the optimizer, muP, metrics, and what a person sees of a run."""
