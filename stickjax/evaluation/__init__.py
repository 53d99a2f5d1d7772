"""How good a model is: pairs of sentences by class, and pictures."""
