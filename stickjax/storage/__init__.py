"""Models on disk: checkpoints of training, folders of training runs, and Hugging Face folders."""
