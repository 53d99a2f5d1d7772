"""A Sparse Universal Transformer of full size on propositional logic, for one GPU. We have not trained this config.

python -m stickjax.train configs/sut_logic_gpu.py
python -m stickjax.evaluate runs/sut_logic_gpu --max-pairs 100000

The model classifies how two sentences of propositional logic are related. The published model (arXiv 2310.07096) was
trained on sentences with 0 to 6 operators. On sentences with 7 to 12 operators its accuracy is 98, 97, 94, 90, 88 and
81 percent, and its mean depth grows from about 5 to about 9 blocks. Its sizes for this task are not published. So this
config has the sizes of the translation model in the same paper.
"""

from stickjax import Config, DataConfig, ExpertsConfig, OptimConfig, SutConfig, TrainConfig


def get_config() -> Config:
    experts = ExpertsConfig(E=24, k=4, mi_weight=0.001)
    model = SutConfig.sut_base(
        V=12, L=12, classes=7, attention="stick_breaking", normalize_before=True, halting_bias=2.0, dropout=0.1,
        experts=experts, attention_experts=experts, act_weight=0.001, dtype="bfloat16",
    )  # fmt: skip
    B = 128
    epoch = 135_665 // B  # steps of one epoch: 135,665 pairs of sentences with 0 to 6 operators
    data = DataConfig(source="logic", examples=500_000, T=40, B=B, curriculum=2 * epoch)
    optim = OptimConfig(
        schedule="cosine", peak_lr=5e-4, warmup_tokens=epoch * data.tokens_per_step, beta2=0.98, eps=1e-9,
        weight_decay=0.01,
    )  # fmt: skip
    return Config(model, data, optim, TrainConfig(steps=50 * epoch, log_every=50, checkpoint_every=2 * epoch))
