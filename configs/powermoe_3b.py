"""PowerMoE-3B: the mixture of experts of the Power scheduler paper with 3.3B parameters, 800M of them active.

python -m stickjax.train configs/powermoe_3b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

TOKENS is a token file (`python -m stickjax.data tokenize`). We have not trained this model. Training takes 2.0e+22
FLOP: an estimated 571 days on one H200 GPU, at 40% of its bf16 peak. The paper (arXiv 2408.13359) has the expected
results.
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=500 * 10**9)
    steps = round(3e12 / data.tokens_per_step)
    return Config(ModelConfig.powermoe_3b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
