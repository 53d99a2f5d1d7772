"""Ordered Memory on propositional logic at the size of the paper (arXiv 1910.13466). We have not trained this config.

python -m stickjax.train configs/om_logic_gpu.py
python -m stickjax.evaluate runs/om_logic_gpu

The training sentences have 0 to 6 operators, and the test sentences have up to 12 or more. Longer sentences need more
memory slots, so the model uses 12 slots in training and 24 slots in evaluation.

The original code trains for 50 epochs, and halves the learning rate when the validation accuracy stops rising. Here the
learning rate follows a cosine over 50 epochs.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import OrderedMemoryConfig

EPOCH = 128_884 // 128  # steps of one epoch: 128,884 training pairs, without the validation pairs (1 in 20)


def get_config() -> Config:
    model = OrderedMemoryConfig(
        D=200, H=200, N=12, evaluation_N=24, cell_dropout=0.2, memory_dropout=0.2, input_dropout=0.1,
        output_dropout=0.3,
    )  # fmt: skip
    data = DataConfig(source="logic", examples=500_000, T=40, B=128, valid_every=20)
    optim = OptimConfig(schedule="cosine", peak_lr=0.001, beta1=0.0, beta2=0.999, eps=1e-9, weight_decay=0.0)
    return Config(model, data, optim, TrainConfig(steps=50 * EPOCH, log_every=20, checkpoint_every=EPOCH))
