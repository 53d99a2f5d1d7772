"""Text from a trained model: one call reads the prompts, then one jitted step per token reads it from the cache.

python -m stickjax.generate RUN --prompt "def main(" [--temperature 0.8] [--top-p 0.95] [--stop TEXT ...]
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stickjax.config import parse
from stickjax.models.transformer import Cache, Transformer, empty_cache, init  # noqa: F401 (init: the doctests)
from stickjax.run import Loaded, load, read_config
from stickjax.tokenizer import StreamDecoder, Tokenizer


def generate(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eot: int | None = None,
    vocab_size: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """The tokens that follow each of B prompts, drawn from softmax(logits / temperature).

    Equal seeds give equal tokens. A row's tokens depend on its prompt, its index and the seed, not on the other rows.

    Args:
      model: from `init` or `load`.
      prompts: B arrays of token ids, of any lengths; an empty one begins with `eot`.
      max_new_tokens: at most so many per row.
      temperature: 0 takes the most likely token.
      top_k: draw from the k most likely tokens only.
      top_p: draw from the fewest likely tokens that together have probability top_p (after temperature and top_k;
        nucleus sampling, `arXiv 1904.09751 <https://arxiv.org/abs/1904.09751>`_).
      seed: of the draws.
      eot: end-of-text id; a row ends with it. None: no id ends a row.
      vocab_size: ids from here on are never chosen (V may be padded); None: V.
      on_token: called as `on_token(row, id)` for each new token when it is there; returning True ends the row.

    Returns:
      B lists of new ids. The last one is `eot` when that is what ended the row.

    Raises:
      ValueError: an option out of range, a prompt id outside the vocabulary, an empty prompt without `eot`.

    >>> from stickjax.config import ModelConfig
    >>> model = init(ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16), jax.random.key(0))
    >>> [len(row) for row in generate(model, [[1, 2, 3], [4]], 5, temperature=1.0, top_p=0.9)]
    [5, 5]
    """
    config = model.config
    vocab_size = config.V if vocab_size is None else min(vocab_size, config.V)
    _check_options(max_new_tokens, temperature, top_k, top_p)
    rows = [_prompt_ids(row, prompt, eot, vocab_size) for row, prompt in enumerate(prompts)]
    if not rows:
        return []
    # Padding is on the left, so that all rows take the same place of the cache at every step.
    T = _bucket(max(map(len, rows)))
    tokens, segment_ids = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), -1, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, T - len(ids) :], segment_ids[row, T - len(ids) :] = ids, 0
    advance = partial(
        _advance, model, key=jax.random.key(seed),
        temperature=max(temperature, 1e-30) if temperature else None,  # not denormal: a division follows
        top_p=top_p, top_k=top_k and min(top_k, vocab_size), vocab_size=vocab_size,
    )  # fmt: skip
    cache = empty_cache(config, len(rows), _bucket(T + max_new_tokens))
    ids, cache = advance(tokens, segment_ids, cache, index=0)
    new: list[list[int]] = [[] for _ in rows]
    going, together = set(range(len(rows))), np.zeros((len(rows), 1), np.int32)
    for index in range(1, max_new_tokens + 1):
        chosen = ids
        if index < max_new_tokens:  # begun before the present tokens are looked at: the device never waits for Python
            ids, cache = advance(chosen[:, None], together, cache, index=index)
        for row, token in enumerate(np.asarray(chosen).tolist()):
            if row not in going:
                continue  # an ended row runs on, unseen, until all have ended
            new[row].append(token)
            asked = on_token is not None and on_token(row, token)
            if asked or token == eot:
                going.discard(row)
        if not going:
            break
    return new


@partial(jax.jit, static_argnames=("top_k", "vocab_size"), donate_argnames="cache")
def _advance(
    model: Transformer, tokens, segment_ids, cache: Cache, *, key, index, temperature, top_p, top_k, vocab_size
) -> tuple[jax.Array, Cache]:
    """Read tokens [B,T] into the cache and choose what follows each row: ids [B]. The `index`-th new token."""
    output = model(tokens, segment_ids, cache=cache)
    known = jnp.arange(output.logits.shape[-1]) < vocab_size
    logits = jnp.where(known[None], output.logits[:, -1], -jnp.inf)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), index))(jnp.arange(len(tokens)))
    choose = partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    return jax.vmap(choose)(logits, keys).astype(jnp.int32), output.cache


def _choose(logits, key, *, temperature, top_k, top_p):
    """One id from logits [V]; a temperature of None takes the most likely."""
    if temperature is None:
        return jnp.argmax(logits)
    logits = (logits - logits.max()) / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits)
    logits, ids = jax.lax.top_k(logits, top_k or len(logits))  # from the most to the least likely
    if top_p is not None:
        p = jax.nn.softmax(logits)
        likelier = jnp.cumsum(p) - p  # exactly 0 for the first, which therefore always stays
        logits = jnp.where(likelier < top_p, logits, -jnp.inf)
    return ids[jax.random.categorical(key, logits)]


def _bucket(n: int) -> int:
    """`n` rounded up to one of few sizes (multiples of 64, then four per power of two): each size is compiled once."""
    step = max(64, 1 << (n - 1).bit_length() - 3)
    return -(-n // step) * step


def _check_options(max_new_tokens, temperature, top_k, top_p) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")


def _prompt_ids(row: int, prompt, eot: int | None, vocab_size: int) -> np.ndarray:
    ids = np.asarray(prompt)
    if not ids.size:
        if eot is None:
            raise ValueError(f"prompt {row} is empty, and there is no eot to begin with")
        ids = np.array([eot])
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompt {row} must be a list of token ids, not {ids.dtype}{list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"prompt {row} has ids {ids.min()}..{ids.max()}, outside the vocabulary of {vocab_size}")
    return ids


class _TextStream:
    """The text of one row as it becomes certain: whole characters, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder, self._stop, self._held = StreamDecoder(tokenizer), stop, ""
        self.stopped = False

    def feed(self, token: int) -> str:
        return self._release(self._decoder.feed(token))

    def close(self) -> str:
        """What was held back and is no stop string; a character that the end of the row cut in half is dropped."""
        if self.stopped:
            return ""
        return self._release(self._decoder.flush().rstrip("\ufffd")) + self._held

    def _release(self, text: str) -> str:
        self._held += text
        # The first to be complete stops, however the tokens divide the text; of several, the longest.
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped, size = True, min(found)[1]
            shown, self._held = self._held[:size], ""
            return shown
        begun = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        size = len(self._held) - begun
        shown, self._held = self._held[:size], self._held[size:]
        return shown


def generate_text(
    loaded: Loaded,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The texts that follow each of B prompts, up to the end of text, a stop string or `max_new_tokens`.

    Args:
      loaded: from `stickjax.load(run)`.
      prompts: B texts.
      max_new_tokens, temperature, top_k, top_p, seed: as in `generate`.
      stop: strings that end a text; they are not part of it.
      on_text: called as `on_text(row, piece)` with whole characters that will stay; a row's pieces, joined, are its text.

    Raises:
      ValueError: as `generate`; a string where a list of strings is due; an empty stop string.

    >>> from stickjax import Config, ModelConfig
    >>> from stickjax.tokenizer import load_tokenizer
    >>> config = Config(ModelConfig(D=8, L=2, N=2, K=1, H=4, F=16))
    >>> loaded = Loaded(init(config.model, jax.random.key(0)), config, load_tokenizer("byte"), 0)
    >>> len(generate_text(loaded, ["one", "and another"], 8, stop=["."]))
    2
    """
    if isinstance(prompts, str) or isinstance(stop, str):
        raise ValueError("prompts and stop are lists of strings, not one string")
    if "" in stop:
        raise ValueError("a stop string is empty")
    tokenizer = loaded.tokenizer
    streams = [_TextStream(tokenizer, stop) for _ in prompts]
    texts = ["" for _ in prompts]

    def show(row: int, piece: str) -> None:
        texts[row] += piece
        if piece and on_text is not None:
            on_text(row, piece)

    def on_token(row: int, token: int) -> bool:
        show(row, streams[row].feed(token))
        return streams[row].stopped

    generate(
        loaded.model, [tokenizer.encode(prompt) for prompt in prompts], max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        eot=tokenizer.eot, vocab_size=tokenizer.vocab_size, on_token=on_token,
    )  # fmt: skip
    for row, stream in enumerate(streams):
        show(row, stream.close())
    return texts


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)  # one line and exit code 1, like all other bad input


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _Parser(prog="python -m stickjax.generate", description="Continue prompts with a trained model.")
    parser.add_argument("run", help="run folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="may be repeated; without any, the prompt is standard input")
    source.add_argument("--prompt-file", help="a file that is one prompt, to its last newline")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default 0.8)")
    parser.add_argument("--top-k", type=int, help="draw from the k most likely tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the most likely tokens of this total probability only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as model.window=128")
    try:
        args = parser.parse_args(argv)
        _check_options(args.max_new_tokens, args.temperature, args.top_k, args.top_p)  # before the model is read
        keys = [word.partition("=")[0] for word in args.set]
        changed = parse(read_config(args.run), [f"--{word}" for word in args.set]).to_dict()
        changes = {key: changed[key.split(".")[0]][key.split(".")[1]] for key in keys}
        prompts = args.prompt or [Path(args.prompt_file).read_text() if args.prompt_file else sys.stdin.read()]
        loaded = load(args.run, step=args.step, changes=changes)

        def on_text(row, piece):
            if len(prompts) == 1:
                print(piece, end="", flush=True)

        texts = generate_text(
            loaded, prompts, args.max_new_tokens, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, seed=args.seed, stop=args.stop, on_text=on_text,
        )  # fmt: skip
        print()
        for row, text in enumerate(texts if len(prompts) > 1 else ()):
            print(f"--- prompt {row}\n{text}")
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, OverflowError, NotImplementedError, RuntimeError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
