"""Models on disk: checkpoints, run folders, Hugging Face folders."""
