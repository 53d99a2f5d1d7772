"""A small stick-breaking mixture of experts for Python source, which trains in a few minutes on two CPU cores.

python -m stickjax.train configs/tiny.py
python -m stickjax.evaluate runs/tiny

Training takes two to four minutes on two CPU cores. The second command should print a held-out loss of about 2.14 bits
per byte with contexts of T tokens, the length in training. With contexts of 8 T tokens, the loss should not be higher.
"""

from stickjax import Config, DataConfig, ExpertsConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    model = ModelConfig(
        D=128, L=4, N=4, K=4, H=32, F=192, m_width=0.5, m_emb=12.0, m_res=0.5, logits_scaling=1.0,
        attention_scale=32**-0.5, experts=ExpertsConfig(E=8, k=2, switch_weight=0.01, z_weight=0.001),
    )  # fmt: skip
    data = DataConfig(source="stdlib", T=256, B=16)
    step = data.tokens_per_step
    optim = OptimConfig(schedule="power", peak_lr=0.002, warmup_tokens=40 * step, decay_tokens=100 * step)
    return Config(model, data, optim, TrainConfig(steps=500))
