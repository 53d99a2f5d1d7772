"""A small Sparse Universal Transformer that learns how two sentences of propositional logic relate to each other.

python -m stickjax.train configs/sut_logic.py
python -m stickjax.evaluate runs/sut_logic

An hour or more on two CPU cores; it has not been run to its end yet.
"""

from stickjax import Config, DataConfig, OptimConfig, SutConfig, TrainConfig


def get_config() -> Config:
    model = SutConfig(
        V=12, D=64, L=8, K=2, H=16, attention_experts=4, attention_k=2, F=64, E=4, k=2, classes=7,
        attention="stick_breaking", mi_weight=0.001, halting_bias=2.0,
    )  # fmt: skip
    data = DataConfig(source="logic", examples=500_000, T=40, B=64, curriculum=1500)
    step = data.tokens_per_step
    optim = OptimConfig(
        schedule="cosine", peak_lr=0.001, warmup_tokens=100 * step, beta2=0.98, eps=1e-9, weight_decay=0.01
    )
    return Config(model, data, optim, TrainConfig(steps=8000, log_every=20, checkpoint_every=500))
