"""Compute the log-likelihoods that tasks of lm-evaluation-harness request. The package lm_eval is not needed here.

A request is a pair of texts: a context, and a continuation whose log-likelihood is wanted. The texts are divided into
tokens as in the harness, so that the numbers can be compared with numbers from the harness for other models.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

from stickjax.data.special_tokens import token_texts
from stickjax.data.tokenizer import Tokenizer
from stickjax.evaluation.held_out import row_scores
from stickjax.evaluation.length_buckets import padded_length

BATCH_TOKENS = 2**13  # the largest number of tokens in one call of the model; at least one text is used
MAX_NEW_TOKENS = 256  # if a task does not set the largest number of new tokens, as in the harness
# The names of this number in tasks. If a task has several of them, the first one counts.
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # values that change nothing


class Pair(NamedTuple):
    """The token ids of a context and of its continuation. The context has at least one token."""

    context: list[int]
    continuation: list[int]


def first_token(tokenizer: Tokenizer) -> int:
    """Return the token id that stands for an empty context: the begin-of-text token, or else the end-of-text token.

    The begin-of-text token is the token "bos_token" in the files of the tokenizer, or else the begin-of-text token in
    its `prefix`.
    """
    text = token_texts(tokenizer.files, Path()).get("bos_token")
    named = None if text is None else tokenizer.special_id(text)
    return next(token for token in (named, tokenizer.bos, tokenizer.eot) if token is not None)


def encoded_pair(tokenizer: Tokenizer, context: str, continuation: str, first: int) -> Pair:
    """Divide a context with its continuation into tokens, and return the token ids of both.

    Spaces at the end of the context are moved to the beginning of the continuation, because most tokenizers put a space
    and the word after it into one token. The context with the continuation is encoded as one text. If the context alone
    has n tokens, the first n tokens belong to the context. A context without tokens becomes the token `first`, the
    result of the function `first_token`.

    Raises ValueError if the continuation has no tokens.

    >>> from stickjax.data.tokenizer import ByteTokenizer
    >>> encoded_pair(ByteTokenizer(), "a ", "b", first=256)
    Pair(context=[97], continuation=[32, 98])
    """
    if context:
        moved = context[len(context.rstrip()) :]
        context, text = context[: len(context) - len(moved)], moved + continuation
        count = len(tokenizer.encode(context, special=True))
        ids = tokenizer.encode(context + text, special=True).tolist()
        pair = Pair(ids[:count] or [first], ids[count:])
    else:
        ids = tokenizer.encode(continuation, special=True).tolist()[len(tokenizer.prefix) :]
        pair = Pair(ids[:1], ids[1:]) if ids[:1] == [first] else Pair([first], ids)
    if not pair.continuation:
        raise ValueError(f"the continuation {continuation!r} of the context {context[-40:]!r} has no tokens of its own")
    return pair


def rolling_pairs(tokenizer: Tokenizer, text: str, max_length: int, first: int) -> Iterator[Pair]:
    """Divide a text into pairs (context, tokens to predict), so that each token of the text is predicted once.

    The model reads a pair without its last token: at most `max_length` tokens. Every pair predicts `max_length` tokens;
    only the last pair may predict fewer. The context of the first pair is `first`, the result of the function
    `first_token`. The context of a later pair is the token before the predicted tokens. If the last of several pairs
    predicts fewer tokens, its context has more of the earlier tokens, so that the model reads `max_length` tokens.

    If the tokenizer puts a begin-of-text token in front of the text, this token is predicted too, as in the harness.

    >>> from stickjax.data.tokenizer import ByteTokenizer
    >>> for pair in rolling_pairs(ByteTokenizer(), "ABCDE", 3, first=256):
    ...     print(*pair)
    [256] [65, 66, 67]
    [66, 67] [68, 69]
    """
    ids = tokenizer.encode(text, special=True).tolist()
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield Pair(ids[end - max_length - 1 : start] if start else [first], ids[start:end])


def log_likelihoods(
    model: nnx.Module, pairs: Sequence[Pair], max_length: int, batch_tokens: int = BATCH_TOKENS
) -> list[tuple[float, bool]]:
    """Return (log-likelihood in nats, is greedy) of the continuation of each pair.

    A continuation is greedy if each of its tokens is the most likely one after the previous tokens. If a pair has more
    than max_length + 1 tokens, tokens at the beginning of its context are left out. Pairs of about the same length are
    in one batch, so that JAX compiles the model for few shapes.

    Raises ValueError if a continuation has more than `max_length` tokens.
    """
    if (longest := max((len(pair.continuation) for pair in pairs), default=0)) > max_length:
        raise ValueError(
            f"a continuation has {longest} tokens, but the model reads at most {max_length} at once; set --max-length "
            f"to {longest} or more"
        )
    rows = [(pair.context + pair.continuation)[-(max_length + 1) :] for pair in pairs]
    size = lambda i: min(padded_length(len(rows[i]) - 1), max_length)  # noqa: E731
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for T, group in groupby(sorted(range(len(rows)), key=size), key=size):
        own = list(group)
        windows, target_mask = np.zeros((len(own), T + 1), np.int32), np.zeros((len(own), T), bool)
        for row, i in enumerate(own):
            last = len(rows[i]) - 1
            windows[row, : last + 1] = rows[i]
            target_mask[row, last - len(pairs[i].continuation) : last] = True
        B = min(max(1, batch_tokens // T), 1 << (len(own) - 1).bit_length())
        for i, nll, greedy in zip(own, *row_scores(model, windows, target_mask, B), strict=True):
            found[i] = -float(nll), bool(greedy)
    return found


class Sampling(NamedTuple):
    """How a task wants texts to be continued: options of `stickjax.generate.generate`.

    `stop`: strings that end a text.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def sampling(options: dict) -> Sampling:
    """Read the entry `generation_kwargs` of a task of the harness.

    Without a temperature above 0, or with do_sample false, the most likely token is always taken.

    Raises ValueError for an option that `generate` does not have.

    >>> sampling({"until": ["."], "max_gen_toks": 8, "do_sample": False, "temperature": 1.0})
    Sampling(max_new_tokens=8, stop=('.',), temperature=0.0, top_k=None, top_p=None)
    """
    known = {"until", "do_sample", "temperature", "top_k", "top_p", *_MAX_NEW_TOKENS}
    for name, value in options.items():
        if name not in known and _NEUTRAL.get(name) != value:
            raise ValueError(
                f"generation_kwargs has {name}={value!r}, which generate does not support; it supports "
                f"{', '.join(sorted(known))}"
            )
    until = options.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    if wrong := [text for text in stop if not isinstance(text, str)]:
        raise ValueError(f"generation_kwargs has until={until!r}, but {wrong[0]!r} is not a string")
    sizes = [int(options[name]) for name in _MAX_NEW_TOKENS if options.get(name) is not None]
    greedy = options.get("do_sample") is False
    temperature = 0.0 if greedy else float(options.get("temperature") or 0)
    if temperature == 0:
        return Sampling((sizes or [MAX_NEW_TOKENS])[0], stop)
    top_k = options.get("top_k") or 0
    return Sampling(
        (sizes or [MAX_NEW_TOKENS])[0], stop, temperature, top_k if top_k > 0 else None, options.get("top_p")
    )


def prompt_room(max_length: int, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have, if `max_new_tokens` tokens after it must fit into `max_length` tokens.

    Raises ValueError if the new tokens leave no room for a prompt.

    >>> prompt_room(1024, max_new_tokens=256)
    768
    """
    if max_length <= max_new_tokens:
        raise ValueError(
            f"the task wants up to {max_new_tokens} new tokens, but the model reads at most {max_length} tokens at "
            f"once, with the prompt; set --max-length above {max_new_tokens}"
        )
    return max_length - max_new_tokens


def cut(text: str, stop: Sequence[str]) -> str:
    """Cut the text where stop[0] begins, then the result where stop[1] begins, and so on, as the harness does.

    >>> cut("one. two, three", [",", "."])
    'one'
    """
    for end in stop:
        text = text.split(end, 1)[0]
    return text
