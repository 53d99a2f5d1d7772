"""Evaluate trained models: their accuracy on labelled sentences and translations, the trees they induce, and plots."""
