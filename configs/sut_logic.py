"""A small Sparse Universal Transformer that classifies how two sentences of propositional logic are related.

export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_NUM_CPU_DEVICES=2
python -m stickjax.train configs/sut_logic.py --mesh.data=2
python -m stickjax.evaluate runs/sut_logic --max-pairs 512

The first line makes two virtual devices, which use two CPU cores. It also puts arrays into huge pages, which reduces
the time by a quarter. Training took 52 minutes of wall time and 88 minutes of CPU time on two CPU cores, while tests
were also running (2026-11-28).

The model is trained on pairs of sentences with 0 to 6 operators. The table has a column for each number of operators.
The row "accuracy" is the percentage of held-out pairs that the model classifies correctly. "commonest label" is the
percentage of pairs with the most frequent label. "depth" is the mean number of blocks applied to a token. "published"
is the accuracy in percent of the original model (arXiv 2310.07096), which was also trained on 0 to 6 operators. A
column is measured on 512 pairs, except column 0 (all 6 pairs) and column 1 (all 409 pairs). The last column also has
pairs with more than 12 operators:

    operators           0    1    2    3    4    5    6    7    8    9   10   11   12
    accuracy          100  100   96   93   88   86   79   77   66   64   61   59   55
    commonest label    67   53   59   53   52   53   54   51   49   52   49   48   51
    depth             3.1  4.2  4.4  4.6  4.7  4.9  5.1  5.2  5.3  5.3  5.4  5.5  5.6
    published                                            98   97   94   90   88   81

On all 2241 pairs with 9 operators, the accuracy is 62.0 %, and 49.9 % of the pairs have the commonest label.

The original model is larger. Its sizes for this task and the length of its training are not published. It uses softmax
attention with relative positions, and computes the label from the final state of the first token. We also trained such
a softmax model, with a curriculum (short pairs first). Its accuracy was no better than the accuracy of always
answering the commonest label.
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
