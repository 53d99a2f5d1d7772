"""Latent trees on English questions: the model turns a statement into a question, by moving the main auxiliary verb.

python -m stickjax.train configs/tree_questions.py
python -m benchmarks.trained runs/tree_questions --part test,gen

Two rules fit the training examples: to move the main auxiliary to the front, or to move the first auxiliary (McCoy et
al., 2020). The examples of the part "gen" tell the two rules apart by their first word. With the seeds 0, 1 and 2, the
first word is right in 32, 85 and 92 percent of 2000 examples of "gen". With --model.encoder=gru, it is right in less
than one percent (benchmarks/results/tree_questions*.json). The training with seed 1 took 13 minutes of one CPU core
(2026-12-01).
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import TreeConfig


def get_config() -> Config:
    model = TreeConfig(H=64, N=5, depth=6)
    data = DataConfig(source="questions", T=24, B=100)
    optim = OptimConfig(
        schedule="cosine", peak_lr=1e-3, warmup_tokens=100 * data.tokens_per_step, beta1=0.0, beta2=0.999, eps=1e-9,
        weight_decay=0.0, clip=1.0,
    )  # fmt: skip
    return Config(model, data, optim, TrainConfig(steps=2500, log_every=20, checkpoint_every=500))
