r"""A small Sparse Universal Transformer as a language model, with stick-breaking attention.

python -m stickjax.train configs/sut_lm_tiny.py

The model applies one block up to four times to every token. Training takes two and a half minutes on two CPU cores.
Measured on 2026-11-28 (`python -m stickjax.evaluate` with --max-tokens 65536): a held-out loss of 3.03 bits per byte
with contexts of 256 bytes, and 3.02 with contexts of 2048 bytes. The block is applied four times to nearly all tokens.

The next two commands train a wider model for 150 steps of 1024 tokens, and measure the time that halting saves. The
weight act_weight is larger, so that tokens halt earlier: it is the weight of a loss on the mean halting step.

python -m stickjax.train configs/sut_lm_tiny.py --run runs/wide --model.F=1024 --model.act_weight=0.01 \
    --data.T=64 --data.B=16 --train.steps=150
python -m benchmarks.halting runs/wide
"""

from stickjax import Config, DataConfig, ExpertsConfig, OptimConfig, SutConfig, TrainConfig


def get_config() -> Config:
    model = SutConfig(
        D=128, L=4, K=2, H=32, F=192,
        experts=ExpertsConfig(E=12, k=2, mi_weight=0.001), attention_experts=ExpertsConfig(E=6, k=2, mi_weight=0.001),
        attention="stick_breaking", normalize_before=True, act_weight=0.001,
    )  # fmt: skip
    data = DataConfig(source="stdlib", T=256, B=8)
    step = data.tokens_per_step
    optim = OptimConfig(schedule="cosine", peak_lr=0.002, warmup_tokens=40 * step, weight_decay=0.01)
    return Config(model, data, optim, TrainConfig(steps=400))
