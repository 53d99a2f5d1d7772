"""The 1.3B sparse model (377M active) of the Power scheduler paper.

python -m stickjax.train configs/powermoe_1b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

Time: we have not trained it. It takes 3.5e+21 FLOP, an estimated 102 H200-days at 40% of the bf16 peak.
Expected: in the paper, the average over six tasks is 55.9 (Power) and 55.7 (WSD).
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=100 * 10**9)  # we chose the length of the decay
    steps = round(1.1e12 / data.tokens_per_step)
    return Config(ModelConfig.powermoe_1b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
