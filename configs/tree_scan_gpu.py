"""Latent trees on SCAN, split by length, at the size of the paper (arXiv 2010.04704). We have not trained this config.

python -m stickjax.train configs/tree_scan_gpu.py
python -m stickjax.evaluate runs/tree_scan_gpu

The original code halves the learning rate when the validation accuracy stops rising. Here the learning rate follows a
cosine over 50 epochs.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import TreeConfig

EPOCH = 15_291 // 100  # the number of steps of one epoch: training commands without validation, 100 in a batch


def get_config() -> Config:
    model = TreeConfig(H=128, N=5, depth=8)
    data = DataConfig(source="scan", split="length", valid_every=10, T=24, B=100)
    optim = OptimConfig(
        schedule="cosine", peak_lr=3e-4, beta1=0.0, beta2=0.999, eps=1e-9, weight_decay=0.0, clip=1.0,
    )  # fmt: skip
    return Config(model, data, optim, TrainConfig(steps=50 * EPOCH, log_every=20, checkpoint_every=5 * EPOCH))
