"""The Sparse Universal Transformers: a classifier of pairs of sentences, a language model, and a translation model.

A model has one stack, or an encoder stack and a decoder stack. A stack applies one block of experts again and again,
until every token has halted, but at most L times.

Tan et al., `Sparse Universal Transformer <https://arxiv.org/abs/2310.07096>`_.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from stickjax.config import SutConfig
from stickjax.models.attention import segment_positions
from stickjax.models.classifier import compared
from stickjax.models.layers import LayerNorm, cast, dropout, normal, uniform
from stickjax.models.router import RouterStats, router_stats
from stickjax.models.universal.block import SutBlock
from stickjax.models.universal.halting import Halting, HaltingGate, until_halted
from stickjax.models.vocabulary import TargetScores, scores_in_pieces
from stickjax.parallel.collectives import psum_over_batch


class SutOutput(NamedTuple):
    """The output of a Universal Transformer for a batch.

    `logits`: [B,classes] for pairs of sentences, else [B,T,V], in float32. None if the model was called with targets.
    `depth`: [B,T], for pairs [2,B,T]: the expected number of times that the block is applied to a token.
    `act`: the mean halting step of the tokens. The halting step of a token is the number of the step in which it halts;
      the first step has the number 0. A loss on `act` makes tokens halt earlier.
    `router`: {name of a router: its losses and the loads of its experts, over all steps}. In the losses, every token
      has a weight in each step: the probability that it has not halted yet.
    `rows`: {name of a router: array [L]}, the number of (token, choice) pairs that the experts on this device computed
      in each step.
    `scores`: the scores of the targets; None if the model was called without targets.
    """

    logits: jax.Array | None
    depth: jax.Array
    act: jax.Array
    router: dict[str, RouterStats]
    rows: dict[str, jax.Array]
    scores: TargetScores | None = None


class UniversalStack(nnx.Module):
    """A stack applies one `SutBlock` to the tokens in up to L steps, until every token has halted.

    All steps use the same parameters. Besides the block, the stack has a gate, which decides when a token halts. If the
    config has `normalize_before`, the stack also has a final LayerNorm. With `causal`, no token attends to later
    tokens. With `cross`, the block also has cross-attention to another sequence.
    """

    def __init__(self, config: SutConfig, key, *, causal: bool, cross: bool = False):
        self.config = config
        k_block, k_gate = jax.random.split(key)
        self.block = SutBlock(config, k_block, causal=causal, cross=cross)
        self.gate = HaltingGate(config, k_gate)
        self.norm = LayerNorm(config) if config.normalize_before else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        source: Float[Array, "B S D"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key=None,
        *,
        threshold=None,
        stop_early: bool = False,
    ) -> Halting:
        """Apply the block up to L times. Return a `Halting`, whose `state` has the final states of the tokens.

        Args:
          x: the embedded tokens.
          segment_ids: tokens attend only to tokens with the same id; a negative id is padding.
          source, source_segment_ids: the final states [B,S,D] and the segment ids of the sequence to which
            cross-attention attends, in a stack with `cross`.
          key: a random key for a training step, or None.
          threshold: replaces `halting_threshold` of the config; None: do not replace it.
          stop_early: stop when all tokens have halted; `jax.grad` then raises an error.
        """
        c = self.config

        def block(h, s, running, step):
            k = None if key is None else jax.random.fold_in(key, step)
            h, sums = self.block(h, s, running, segment_ids, source, source_segment_ids, k)
            rows = {name: one.rows.sum().astype(jnp.int32) for name, one in sums.items()}
            return h, sums, rows

        if c.remat == "full":
            # Inside a scan, XLA cannot merge the recomputation with the forward pass, so this need not be prevented.
            block = jax.checkpoint(block, prevent_cse=False)
        threshold = c.halting_threshold if threshold is None else threshold
        end = until_halted(block, self.gate, x, segment_ids >= 0, c.L, threshold, stop_early=stop_early)
        state = end.state.astype(x.dtype)
        return end._replace(state=state if self.norm is None else self.norm(state))


class PairClassifier(nnx.Module):
    """A classifier of pairs of sentences.

    The logits of the label are W_2 elu(W_1 [u; v; u * v; |u - v|] + b_1) + b_2, with 4 D hidden units. u is the final
    state of one token of the left sentence, and v is the final state of one token of the right sentence. With
    stick-breaking attention, which is causal, this token is the last one of its sentence. With softmax attention, it is
    the first one. In the built-in data, a sentence is a logic formula. Its first token is its outermost bracket, or its
    only variable. For softmax attention, other data must begin every sentence with a special token.
    """

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_embed, k_stack, *keys = jax.random.split(key, 6)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.D**-0.5, c)
        self.stack = UniversalStack(c, k_stack, causal=c.causal)
        wide = 4 * c.D
        self.w_in = uniform(keys[0], (wide, wide), wide**-0.5, c)
        self.in_bias = uniform(keys[1], (wide,), wide**-0.5, c)
        self.w_out = uniform(keys[2], (wide, c.classes), wide**-0.5, c)
        self.out_bias = uniform(keys[3], (c.classes,), wide**-0.5, c)

    def __call__(self, batch, key=None, *, threshold=None, stop_early: bool = False) -> SutOutput:
        c = self.config
        tokens = jnp.concatenate([batch["left"], batch["right"]])
        end = encoded(self.stack, self.embed, tokens, key, threshold=threshold, stop_early=stop_early)
        position = (tokens != 0).sum(1) - 1 if c.causal else jnp.zeros(len(tokens), int)
        u, v = jnp.split(jnp.take_along_axis(end.state, position[:, None, None], axis=1)[:, 0], 2)
        w_in, in_bias, w_out, out_bias = (cast(p, c) for p in (self.w_in, self.in_bias, self.w_out, self.out_bias))
        hidden = jax.nn.elu(compared(u, v) @ w_in + in_bias[None])
        k_drop = None if key is None else jax.random.fold_in(key, c.L)
        hidden = dropout(hidden, c.dropout, k_drop)
        logits = (hidden @ w_out + out_bias[None]).astype(jnp.float32)
        output = summary(logits, [(end, tokens != 0)])
        return output._replace(depth=output.depth.reshape(2, *batch["left"].shape))


class LanguageModel(nnx.Module):
    """A causal language model. Its embedding is also the output matrix.

    The state of a token and its halting probabilities do not depend on later tokens. If the model is
    called with `targets` [B,T], the output has `scores` and no logits (see `scores_in_pieces`).
    """

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_embed, k_stack = jax.random.split(key)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.D**-0.5, c)
        self.stack = UniversalStack(c, k_stack, causal=True)

    def __call__(self, batch, key=None, *, threshold=None, stop_early: bool = False, targets=None) -> SutOutput:
        tokens = batch["tokens"]
        segments = batch.get("segment_ids", jnp.zeros_like(tokens))
        x, keys = embedded(self.config, self.embed, tokens, segments, key)
        end = self.stack(x, segments, key=keys, threshold=threshold, stop_early=stop_early)
        logits = partial(unembedded, embed=cast(self.embed, self.config))
        if targets is None:
            return summary(logits(end.state), [(end, segments >= 0)])
        scores = scores_in_pieces(logits, end.state, targets, self.embed.shape[0])
        return summary(None, [(end, segments >= 0)])._replace(scores=scores)


class SparseUniversalTransformer(nnx.Module):
    """An encoder and a decoder for translation.

    One matrix is the embedding of the source, the embedding of the target and the output matrix.

    A batch has the token ids `source` [B,S] and `target` [B,T], both padded with 0. At every position of `target`, the
    logits [B,T,V] predict the next token.
    """

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_embed, k_encoder, k_decoder = jax.random.split(key, 3)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.D**-0.5, c)
        self.encoder = UniversalStack(c, k_encoder, causal=False)
        self.decoder = UniversalStack(c, k_decoder, causal=True, cross=True)

    def __call__(self, batch, key=None, *, threshold=None, stop_early: bool = False) -> SutOutput:
        how = dict(threshold=threshold, stop_early=stop_early)
        k_encoder, k_decoder = (None, None) if key is None else jax.random.split(key)
        source, target = batch["source"], batch["target"]
        encoder_end = encoded(self.encoder, self.embed, source, k_encoder, **how)
        segments, source_segments = segments_of(target), segments_of(source)
        x, keys = embedded(self.config, self.embed, target, segments, k_decoder)
        decoder_end = self.decoder(x, segments, encoder_end.state, source_segments, keys, **how)
        logits = unembedded(decoder_end.state, cast(self.embed, self.config))
        return summary(logits, [(decoder_end, target != 0), (encoder_end, source != 0)], ("", "encoder_"))


def segments_of(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return segment ids: -1 for padding, which is token id 0, and 0 for all other tokens."""
    return jnp.where(tokens != 0, 0, -1)


def sinusoidal(T: int, D: int) -> Float[np.ndarray, "T D"]:
    """Return the sinusoidal embeddings [T,D] of the positions t from 0 to T - 1 (arXiv 1706.03762).

    An angle is t * 10000^(-i / (D/2)), for i from 0 to D/2 - 1. The first D/2 numbers of an embedding are the sines of
    these angles, and the last D/2 numbers are the cosines.

    >>> sinusoidal(2, 4)[:, 2:].tolist() == [[1, 1], [np.float32(np.cos(1)), np.float32(np.cos(0.01))]]
    True
    """
    angle = np.arange(T)[:, None] * 10_000.0 ** -(np.arange(D // 2) / (D // 2))[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def embedded(config: SutConfig, embed, tokens, segment_ids, key):
    """Embed `tokens` [B,T]. Return (the input [B,T,D] of a stack, a new random key for the stack).

    `embed` [V,D] is the embedding matrix. The input for a token is sqrt(D) times its row of `embed`. If the config has
    `sinusoidal` and `attention="softmax"`, sinusoidal position embeddings are added. Positions count from the first
    token of each segment. The input for padding, which has a negative segment id, is zero. With a random `key`, dropout
    is applied to the input. Without a key, the new key is None.
    """
    x = config.D**0.5 * cast(embed, config)[tokens]
    if config.sinusoidal and not config.causal:
        positions = segment_positions(segment_ids)  # not the index in the array, because padding may be on the left
        x += jnp.asarray(sinusoidal(tokens.shape[1], config.D), x.dtype)[positions]
    k_drop, key = (None, None) if key is None else jax.random.split(key)
    return dropout(jnp.where((segment_ids >= 0)[..., None], x, 0), config.dropout, k_drop), key


def encoded(stack: UniversalStack, embed, tokens, key, **how) -> Halting:
    """Embed `tokens` [B,T], which are padded with 0, and run the stack on them. Return the result of the stack.

    `embed` [V,D] is the embedding matrix. `key` is a random key for a training step, or None. `how`: further arguments
    of the stack.
    """
    segments = segments_of(tokens)
    x, key = embedded(stack.config, embed, tokens, segments, key)
    return stack(x, segments, key=key, **how)


def unembedded(state: Float[Array, "B T D"], embed: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    return jnp.einsum("BTD,VD->BTV", state, embed, preferred_element_type=jnp.float32)


def summary(logits, stacks, prefixes=("",)) -> SutOutput:
    """Make the `SutOutput` of a model from its logits and from the results of its stacks.

    `stacks`: for each stack, the pair (its result, which is a `Halting`; its token mask). `prefixes`: for each stack, a
    prefix for the names of its routers, such as "encoder_". In the `SutOutput`, `depth` is the depth of the first
    stack, and `act` is the mean halting step of the tokens of all stacks.
    """
    router, rows, act, tokens = {}, {}, 0.0, 0.0
    for (end, token_mask), prefix in zip(stacks, prefixes, strict=True):
        router |= {prefix + name: router_stats(sums) for name, sums in end.statistics.items()}
        rows |= {prefix + name: counts for name, counts in end.rows.items()}
        token_mask = token_mask.astype(jnp.float32)
        act += (end.act * token_mask).sum()
        tokens += token_mask.sum()
    act = psum_over_batch(act) / jnp.maximum(psum_over_batch(tokens), 1)
    return SutOutput(logits, stacks[0][0].depth, act, router, rows)
