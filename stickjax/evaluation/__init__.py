"""Evaluation: the accuracy of classifiers of pairs, and plots."""
