"""The mixture of experts of the Power scheduler paper (arXiv 2408.13359) with 1.3B parameters, 377M of them active.

python -m stickjax.train configs/powermoe_1b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

TOKENS is a token file (`python -m stickjax.data tokenize`). We have not trained this model. Training takes 3.5e+21
FLOP: an estimated 102 days on one H200 GPU, at 40% of its bf16 peak. In the paper, the average score over six tasks is
55.9 with the Power schedule and 55.7 with the WSD (warmup-stable-decay) schedule.
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=100 * 10**9)  # we chose the length of the decay
    steps = round(1.1e12 / data.tokens_per_step)
    return Config(ModelConfig.powermoe_1b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
