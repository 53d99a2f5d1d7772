"""Evaluate trained models: the accuracy of classifiers of sentence pairs, and plots."""
