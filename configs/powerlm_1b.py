"""The dense language model of the Power scheduler paper (arXiv 2408.13359) with 1.2B parameters.

python -m stickjax.train configs/powerlm_1b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

TOKENS is a token file (`python -m stickjax.data tokenize`). We have not trained this model. Training takes 8.8e+21
FLOP: an estimated 256 days on one H200 GPU, at 40% of its bf16 peak. In the paper, the average score over six tasks is
58.2 with the Power schedule and 57.6 with the WSD (warmup-stable-decay) schedule.
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=100 * 10**9)
    steps = round(1e12 / data.tokens_per_step)
    return Config(ModelConfig.powerlm_1b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
