"""Measure how much a text uses each module (expert), and how much the used modules tell about the source of a text."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from stickjax.config import DataConfig
from stickjax.data.batches import make_batch
from stickjax.data.corpus import load_corpus
from stickjax.models.transformer import Transformer, apply
from stickjax.surgery.kinds import kinds_of, slots

Use = dict[str, np.ndarray]


@jax.jit
def _rows(model: Transformer, batch: dict) -> dict[str, jax.Array]:
    output = apply(model, batch)
    stats = {"attention": output.attention_router, "ffn": output.router}
    return {name: of_kind.load for name, of_kind in stats.items() if of_kind is not None}


def use(model: Transformer, batches: Iterable[Mapping[str, np.ndarray]]) -> Use:
    """Count the (token, choice) pairs that are routed to each module. A module is an expert of one layer.

    A token that uses k modules of a layer has k pairs in this layer.

    Args:
      model: a model with experts.
      batches: each batch has `tokens` [B,T] and, if there is padding, `segment_ids` [B,T], negative for padding.
        Padding tokens are not counted.

    Returns:
      {"attention": [L, columns], "ffn": [L, columns]}: the number of pairs of each router column in each layer, as
      integers. A kind of modules that the model does not have is left out. The router of a layer has a column for each
      module. The columns of the modules that `extend` added come last. A pruned module still has a column, with the
      count 0, if its logit is still in the router's softmax.

    Raises:
      ValueError: the model has no modules.

    >>> from stickjax.config import ExpertsConfig, ModelConfig
    >>> from stickjax.models.transformer import init
    >>> config = ModelConfig(V=16, D=8, L=3, N=2, K=1, H=4, F=16, experts=ExpertsConfig(4, 2, "softmax_topk"))
    >>> use(init(config, jax.random.key(0)), [{"tokens": np.zeros((2, 5), int)}])["ffn"].sum(1).tolist()
    [20, 20, 20]
    """
    kinds = kinds_of(model.config)
    counts = {kind.name: np.zeros(slots(model, kind).shape, np.int64) for kind in kinds}
    for batch in batches:
        batch = {name: batch[name] for name in ("tokens", "segment_ids") if name in batch}
        tokens = batch["tokens"].size if "segment_ids" not in batch else int((batch["segment_ids"] >= 0).sum())
        shares = jax.device_get(_rows(model, batch))
        for kind in kinds:
            rows = np.asarray(shares[kind.name], float) * tokens * kind.chosen(model.config)
            counts[kind.name] += np.rint(rows).astype(np.int64)
    return counts


def mutual_information(uses: Mapping[str, Use]) -> dict[str, np.ndarray]:
    r"""Return the mutual information of modules (experts) and sources in bits, for each of the L layers: {kind: [L]}.

    The mutual information I says how much the module m of a token tells about the source s of the token's text. `uses`
    is {source: the result of `use` for a text of this source}.

    .. math::
        I(m; s) = \frac1S \sum_s \sum_m p(m|s) \log_2 \frac{p(m|s)}{p(m)}, \qquad p(m) = \frac1S \sum_s p(m|s)

    p(m|s) is the share of the (token, choice) pairs of source s that went to module m. All S sources have the same
    weight. I is 0 if all sources use the modules in the same way. I is log2 S if no module is used by two sources.

    >>> mutual_information({"a": {"ffn": np.array([[4, 0], [1, 1]])}, "b": {"ffn": np.array([[0, 7], [3, 3]])}})
    {'ffn': array([1., 0.])}
    """
    kinds = next(iter(uses.values()))
    return {kind: _information(np.stack([shares(use[kind]) for use in uses.values()])) for kind in kinds}


def _information(p: np.ndarray) -> np.ndarray:
    """Return the mutual information in bits [L] for the shares p(m|s) [S, L, columns] (see `mutual_information`)."""
    mean = np.broadcast_to(p.mean(0), p.shape)
    ratio = np.divide(p, mean, out=np.ones_like(p), where=p > 0)
    return (p * np.log2(ratio)).sum(-1).mean(0)


def shares(use: np.ndarray) -> np.ndarray:
    """Convert the counts [L, columns] of `use` to each module's share of the (token, choice) pairs of its layer."""
    return use / np.maximum(use.sum(-1, keepdims=True), 1)


def batches_of(data: DataConfig, *, heldout: bool, max_tokens: int, batch_tokens: int = 2**12) -> list[dict]:
    """Return batches of random windows of the training text, or of the held-out text if `heldout` is True.

    A window has T tokens, where T is `data.T`. A batch has `tokens` [B,T] and `segment_ids` [B,T], and B * T is about
    `batch_tokens`. All batches together have about `max_tokens` tokens, or all tokens of a shorter text. The last batch
    may end with sequences of padding, whose `segment_ids` are -1. Raise ValueError if the text has fewer than T + 1
    tokens.
    """
    corpus, T = load_corpus(data)[heldout], data.T
    windows = (len(corpus.tokens) - 1) // T
    if not windows:
        raise ValueError(f"T={T} needs a text of {T + 1} tokens or more, but {corpus.source} has {len(corpus.tokens)}")
    chosen = np.random.default_rng(0).permutation(windows)[: max(1, max_tokens // T)]
    cut = np.stack([corpus.tokens[i * T : (i + 1) * T + 1] for i in np.sort(chosen)]).astype(np.int32)
    B = min(len(cut), max(1, batch_tokens // T))
    empty = -len(cut) % B
    padded = np.concatenate([cut, np.repeat(cut[:1], empty, 0)])
    batch = make_batch(padded, corpus.tokenizer.eot, corpus.tokenizer.bos)
    batch["segment_ids"][len(cut) :] = -1
    return [{name: batch[name][i : i + B] for name in ("tokens", "segment_ids")} for i in range(0, len(cut) + empty, B)]


def report(
    model: Transformer, sources: Mapping[str, DataConfig], *, max_tokens: int = 2**15, below: float = 0.01
) -> dict[str, Any]:
    """Measure how much the held-out text of each source uses each module (expert). The result can be written as JSON.

    Args:
      model: a model with experts.
      sources: {name: the `DataConfig` of the text}.
      max_tokens: about how many tokens of each source are read.
      below: a module counts as unused if its share of the (token, choice) pairs of its layer is smaller than `below`.

    Returns:
      A dictionary with the following entries. Arrays are nested lists.

      "use": {source: {kind: [L, columns]}}, each router column's share of the (token, choice) pairs of its layer.
      "mutual_information": {kind: [L]}, the result of `mutual_information` in bits.
      "modules": {kind: the number of modules in all layers together}.
      "unused": {source: {kind: the number of modules in all layers that the source does not use}}.
      "below", "max_tokens": the arguments.

    Raises:
      ValueError: the model has no modules, there are no sources, or the text of a source has fewer than T + 1 tokens.
        T is the field `T` of the source's `DataConfig`.
    """
    if not sources:
        raise ValueError("a report needs at least one source of text, but `sources` is empty")
    alive = {kind.name: slots(model, kind) >= 0 for kind in kinds_of(model.config)}
    read = partial(batches_of, heldout=True, max_tokens=max_tokens)
    uses = {name: use(model, read(data)) for name, data in sources.items()}
    shared = {name: {kind: shares(counts) for kind, counts in of.items()} for name, of in uses.items()}
    unused = {n: {kind: int((alive[kind] & (p < below)).sum()) for kind, p in of.items()} for n, of in shared.items()}
    return {
        "use": {name: {kind: p.tolist() for kind, p in of.items()} for name, of in shared.items()},
        "mutual_information": {kind: bits.tolist() for kind, bits in mutual_information(uses).items()},
        "unused": unused,
        "modules": {kind: int(there.sum()) for kind, there in alive.items()},
        "below": below,
        "max_tokens": max_tokens,
    }
