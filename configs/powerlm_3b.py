"""PowerLM-3B: the dense language model of the Power scheduler paper (arXiv 2408.13359) with 3.5B parameters.

python -m stickjax.train configs/powerlm_3b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

TOKENS is a token file (`python -m stickjax.data tokenize`). We have not trained this model. Training takes 2.9e+22
FLOP: an estimated 853 days on one H200 GPU, at 40% of its bf16 peak. The paper has the expected results.
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=250 * 10**9)
    steps = round(1.25e12 / data.tokens_per_step)
    return Config(ModelConfig.powerlm_3b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
