"""Ordered Memory on propositional logic: the model classifies how two sentences are related.

python -m stickjax.train configs/om_logic.py
python -m stickjax.evaluate runs/om_logic

The accuracy on test pairs with 7, 8, 9, 10, 11, and 12 or more operators is 90, 89, 86, 84, 80 and 79 percent. At most
1024 pairs were tested for each of these numbers (benchmarks/results/om_logic.json). The training pairs have at most 6
operators. The last 2500 steps took 37 minutes on one CPU core. All 9000 steps took 137 minutes, while the machine also
did other work (2026-11-30).
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import OrderedMemoryConfig


def get_config() -> Config:
    model = OrderedMemoryConfig(
        V=12, D=64, H=64, N=12, evaluation_N=24, classes=7,
        cell_dropout=0.1, memory_dropout=0.1, input_dropout=0.05, output_dropout=0.1,
    )  # fmt: skip
    data = DataConfig(source="logic", examples=500_000, T=40, B=128, valid_every=20, curriculum=1000)
    step = data.tokens_per_step
    optim = OptimConfig(
        schedule="cosine", peak_lr=0.002, warmup_tokens=100 * step, beta2=0.98, eps=1e-9, weight_decay=0.001
    )
    return Config(model, data, optim, TrainConfig(steps=9000, log_every=20, checkpoint_every=500))
