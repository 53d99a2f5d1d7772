"""A small Sparse Universal Transformer that learns how two sentences of propositional logic relate to each other.

export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_NUM_CPU_DEVICES=2
python -m stickjax.train configs/sut_logic.py --mesh.data=2
python -m stickjax.evaluate runs/sut_logic --max-pairs 512

Two virtual devices make use of two CPU cores, and arrays in huge pages take a quarter off the time. Seen on such a
machine on 2026-11-28: 52 minutes by the clock with tests beside it, 88 minutes of one core. Trained on 0 to 6
operators; percent right of the held-out pairs by number of operators, the share of the commonest label, and the mean
depth of a token in blocks, of 512 pairs each (0: all 6, 1: all 409; of all 2241 with 9 operators 62.0 % are right and
49.9 % have the commonest label). Below, what was published for the original (arXiv 2310.07096), trained on as many
operators:

    operators           0    1    2    3    4    5    6    7    8    9   10   11   12
    accuracy          100  100   96   93   88   86   79   77   66   64   61   59   55
    commonest label    67   53   59   53   52   53   54   51   49   52   49   48   51
    depth             3.1  4.2  4.4  4.6  4.7  4.9  5.1  5.2  5.3  5.3  5.4  5.5  5.6
    published                                            98   97   94   90   88   81

The original is larger; its sizes here, and how long it trained, are not published. Its attention is softmax with
relative positions, read at the first token; under a curriculum that was no better than the commonest label here.
"""

from stickjax import Config, DataConfig, ExpertsConfig, OptimConfig, SutConfig, TrainConfig


def get_config() -> Config:
    experts = ExpertsConfig(E=4, k=2, mi_weight=0.001)
    model = SutConfig(
        V=12, D=64, L=8, K=2, H=16, F=64, experts=experts, attention_experts=experts, classes=7,
        attention="stick_breaking", normalize_before=True, halting_bias=2.0,
    )  # fmt: skip
    data = DataConfig(source="logic", examples=500_000, T=40, B=64, curriculum=1500)
    step = data.tokens_per_step
    optim = OptimConfig(
        schedule="cosine", peak_lr=0.002, warmup_tokens=100 * step, beta2=0.98, eps=1e-9, weight_decay=0.01
    )
    return Config(model, data, optim, TrainConfig(steps=14_000, log_every=20, checkpoint_every=500))
