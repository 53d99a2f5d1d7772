"""Ordered Memory on ListOps at the size of the paper (arXiv 1910.13466). We have not trained this config.

python -m stickjax.train configs/om_listops_gpu.py
python -m stickjax.evaluate runs/om_listops_gpu

The model is trained on lists of at most 50 tokens, and can be evaluated on longer lists.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import OrderedMemoryConfig

EPOCH = 67_691 // 128  # steps of one epoch: 67,691 training lists of up to 50 tokens, in batches of 128


def get_config() -> Config:
    model = OrderedMemoryConfig(
        D=128, H=128, N=21, sentences=1, hidden=False, embedding_std=1.0, cell_dropout=0.1, memory_dropout=0.3,
        input_dropout=0.1, output_dropout=0.2,
    )  # fmt: skip
    data = DataConfig(source="listops", T=50, B=128, valid_every=20)
    optim = OptimConfig(schedule="cosine", peak_lr=0.001, beta1=0.0, beta2=0.999, eps=1e-9, weight_decay=0.0)
    return Config(model, data, optim, TrainConfig(steps=100 * EPOCH, log_every=20, checkpoint_every=EPOCH))
