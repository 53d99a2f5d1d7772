"""Latent trees on SCAN: the model translates commands to actions, and is tested on longer sequences of actions.

python -m stickjax.train configs/tree_scan.py

The config uses the split "length": training commands have at most 22 actions, and test commands have more. After 3500
of the 6000 steps, the model translates all of the 3920 test commands exactly (benchmarks/results/tree_scan.json). The
3500 steps took one hour on one of two CPU cores, while the machine also did other work (2026-11-30). The training
commands of the other splits, except "length_tuning", have up to 48 actions, so these splits need T=48. For example:

python -m stickjax.train configs/tree_scan.py --data.split=add_jump --data.T=48 --train.steps=1200 --run runs/tree_jump

After these 1200 steps, 95.0 percent of the 7706 test commands are translated exactly. With the split "simple" it is all
of 4182, and with "around_right" all of 4476 (benchmarks/results/tree_add_jump.json, tree_simple.json and
tree_around_right.json, 2026-11-30).

The sizes, the dropout rates and the optimizer come from the original code (arXiv 2010.04704), except for the depth (7
instead of 8) and the learning rate. The original code halves the learning rate when the validation accuracy stops
rising. Here the learning rate follows a cosine.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import TreeConfig


def get_config() -> Config:
    model = TreeConfig(H=128, N=5, depth=7)
    data = DataConfig(source="scan", split="length", valid_every=10, T=24, B=100)
    optim = OptimConfig(
        schedule="cosine", peak_lr=6e-4, warmup_tokens=200 * data.tokens_per_step, beta1=0.0, beta2=0.999, eps=1e-9,
        weight_decay=0.0, clip=1.0,
    )  # fmt: skip
    return Config(model, data, optim, TrainConfig(steps=6000, log_every=20, checkpoint_every=500))
