"""The 3B stick-breaking model: no positions, 36 heads of dimension 64, separate embedding and output matrices.

python -m stickjax.train configs/stickbreaking_3b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

The released model was trained in two phases. This config is one run with the Power schedule. You can also branch its
decay from a checkpoint (--from RUN@STEP).

Time: we have not trained it. It takes 2.3e+22 FLOP, an estimated 683 H200-days at 40% of the bf16 peak.
Expected: see arXiv 2410.17980.
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=100 * 10**9)  # we chose the length of the decay
    steps = round(1e12 / data.tokens_per_step)
    return Config(ModelConfig.stickbreaking_3b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
