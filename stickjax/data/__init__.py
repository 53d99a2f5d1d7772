"""From text to batches: sources, tokenizers, token files, mixtures, generated tasks."""
