"""A stick-breaking mixture of experts with 99B parameters, 14B active: our design, for plans with many GPUs.

python -m stickjax.train configs/powermoe_100b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

The sizes follow PowerMoE: 8 experts per token, m_width = D / 256 = 16, residual branches multiplied by 1.4 / sqrt(L).
Time: we have not trained it. It takes 2.7e+23 FLOP, an estimated 8,000 H200-days at 40% of the bf16 peak.
Expected: not known. `python -m stickjax.plan configs/powermoe_100b.py --devices 512` prints the time and memory of a
step.
"""

from stickjax import Config, DataConfig, ExpertsConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    model = ModelConfig(
        V=49152, D=4096, L=48, N=32, K=8, H=128, F=2560, experts=ExpertsConfig(E=64, k=8), m_width=16.0, m_emb=12.0,
        m_res=0.2, attention_scale=1 / 128, dtype="bfloat16", remat="full",
    )  # fmt: skip
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=500 * 10**9)
    steps = round(3e12 / data.tokens_per_step)
    return Config(model, data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
