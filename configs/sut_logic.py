"""A small Sparse Universal Transformer that learns how two sentences of propositional logic relate to each other.

XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m stickjax.train configs/sut_logic.py --mesh.data=2
python -m stickjax.evaluate runs/sut_logic --max-pairs 512

Two virtual devices make use of two CPU cores. Seen on such a machine on 2026-11-22: 115 minutes of one core, 79 minutes
by the clock with other work beside it. Trained on 0 to 6 operators; percent right of the held-out pairs by number of
operators, and the share of the commonest label, of 512 pairs each (0: all 6, 1: all 409; of all 2241 with 9 operators,
by --max-pairs 2300, 63.5 % are right and 49.9 % have the commonest label):

    operators           0    1    2    3    4    5    6    7    8    9   10   11   12
    accuracy          100  100   95   93   89   84   81   75   64   64   60   59   53
    commonest label    67   53   59   53   52   53   54   51   49   52   49   48   51
"""

from stickjax import Config, DataConfig, OptimConfig, SutConfig, TrainConfig


def get_config() -> Config:
    model = SutConfig(
        V=12, D=64, L=8, K=2, H=16, attention_experts=4, attention_k=2, F=64, E=4, k=2, classes=7,
        attention="stick_breaking", normalize_before=True, mi_weight=0.001, halting_bias=2.0,
    )  # fmt: skip
    data = DataConfig(source="logic", examples=500_000, T=40, B=64, curriculum=1500)
    step = data.tokens_per_step
    optim = OptimConfig(
        schedule="cosine", peak_lr=0.002, warmup_tokens=100 * step, beta2=0.98, eps=1e-9, weight_decay=0.01
    )
    return Config(model, data, optim, TrainConfig(steps=14_000, log_every=20, checkpoint_every=500))
