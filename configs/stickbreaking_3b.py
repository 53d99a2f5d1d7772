"""The 3B language model of the stick-breaking attention paper (arXiv 2410.17980).

python -m stickjax.train configs/stickbreaking_3b.py --data.path=TOKENS --data.tokenizer=tokenizer.json

The model has no position embeddings, 36 heads of dimension 64, and separate embedding and output matrices. TOKENS is a
token file (`python -m stickjax.data tokenize`).

The released model was trained in two phases. This config is one run with the Power schedule, in which the learning rate
decays at the end. You can also train only the decay, as a new run from a checkpoint of another run (--from RUN@STEP).

We have not trained this model. Training takes 2.3e+22 FLOP: an estimated 683 days on one H200 GPU, at 40% of its bf16
peak. The paper has the expected results.
"""

from stickjax import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    data = DataConfig(source="tokens", path="data/tokens", tokenizer="data/tokenizer.json", T=4096, B=1024)
    optim = OptimConfig(warmup_tokens=10**9, decay_tokens=100 * 10**9)  # we chose the length of the decay
    steps = round(1e12 / data.tokens_per_step)
    return Config(ModelConfig.stickbreaking_3b(), data, optim, TrainConfig(steps=steps, checkpoint_every=1000))
