"""A stick-breaking mixture of experts with 99B parameters, of which 14B are active. We use it to plan large runs.

python -m stickjax.plan configs/powermoe_100b.py --devices 512
python -m stickjax.train configs/powermoe_100b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

The first command prints the time and memory of a training step. In the second command, TOKENS is a token file
(`python -m stickjax.data tokenize`). The sizes follow PowerMoE (arXiv 2408.13359): 8 experts per token, the muP width
multiplier m_width = D / 256 = 16, and residual branches multiplied by m_res = 1.4 / sqrt(L) = 0.2. We have not trained
this model, so its results are not known. Training takes 2.7e+23 FLOP: an estimated 8,000 days on one H200 GPU, at 40%
of its bf16 peak.
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
