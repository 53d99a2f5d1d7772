"""Models on disk: checkpoints, run folders and Hugging Face folders."""
