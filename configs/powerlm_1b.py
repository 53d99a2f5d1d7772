"""The 1.2B dense model of the Power scheduler paper.

python -m stickjax.train configs/powerlm_1b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

Time: we have not trained it. It takes 8.8e+21 FLOP, an estimated 256 H200-days at 40% of the bf16 peak.
Expected: in the paper, the average over six tasks is 58.2 (Power) and 57.6 (WSD).
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=100 * 10**9)
    steps = round(1e12 / data.tokens_per_step)
    return Config(ModelConfig.powerlm_1b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
