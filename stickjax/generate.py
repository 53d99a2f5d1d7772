"""Generate text with a trained model.

The first call of the model reads all prompts, and gives the first new token of each. Every further call reads the
newest token of each prompt, and gives the next token. All calls are jitted.

python -m stickjax.generate RUN --prompt "def main(" [--temperature 0.8] [--stop TEXT ...] [--mesh.tensor=8]
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.config.command import Parser, command, step_or_best
from stickjax.config.command_line import parse_changes
from stickjax.config.fields import SEED
from stickjax.data.chat import Conversation, chat_prompt
from stickjax.data.tokenizer import StreamDecoder, Tokenizer
from stickjax.evaluation.length_buckets import padded_length
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings, specs
from stickjax.parallel import processes
from stickjax.parallel.collectives import all_rows, rows_of_device
from stickjax.parallel.mesh import AXES, mesh_of, row_parts
from stickjax.storage.hub import local_folder
from stickjax.storage.run_config import read_config
from stickjax.storage.run_folder import Loaded, load
from stickjax.system.allocator import keep_freed_memory
from stickjax.system.memory import free_memory, gib, local_bytes


def generate(
    model: nnx.Module,
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
    """Return the token ids that follow each of B prompts, drawn from softmax(logits / temperature).

    A row is a prompt with its new tokens. With the same options, the new tokens of a row depend only on its prompt, its
    index and the seed. If the model is sharded on a mesh, all devices of the mesh compute the rows together, and every
    process must make the same call.

    Args:
      model: the module with the parameters, such as `stickjax.load(run).model`.
      prompts: B arrays of token ids, of any lengths; an empty prompt becomes `eot`.
      max_new_tokens: the largest number of new tokens in a row.
      temperature: 0 always takes the most likely token.
      top_k: draw only from the k most likely tokens.
      top_p: draw only from the fewest tokens with a total probability of at least top_p. top_k is applied first.
      seed: the seed of the random draws.
      eot: the end-of-text id, which ends a row; None: no id ends a row.
      vocab_size: only ids below this are drawn, because the model's V may include unused ids; None: all V ids.
      on_token: `on_token(row, id)` is called for each new token as soon as it is known. True ends the row.

    Returns B lists of new ids; `eot` is the last id of a row that it ended. Raises ValueError for a wrong option, model
    or prompt id, an empty prompt without `eot`, or a cache that does not fit into memory.

    >>> from stickjax.models.transformer import ModelConfig, init
    >>> model = init(ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16), jax.random.key(0))
    >>> [len(row) for row in generate(model, [[1, 2, 3], [4]], 5, temperature=1.0, top_p=0.9)]
    [5, 5]
    """
    model, mesh = _with_whole_sequences(model)
    vocab_size = min(vocab_size or model.config.vocabulary, model.config.vocabulary)
    options = _options(max_new_tokens, temperature, top_k, top_p, seed, vocab_size)
    if not (rows := [_prompt_ids(row, prompt, eot, vocab_size) for row, prompt in enumerate(prompts)]):
        return []
    tokens, segment_ids, cache = _padded(rows, model.config, max_new_tokens, mesh)
    advance = partial(_advance, model, key=jax.random.key(seed), mesh=mesh, **options)
    ids, cache = advance(tokens, segment_ids, cache, index=0)
    outputs, active, last = [[] for _ in rows], set(range(len(rows))), segment_ids[:, -1:]
    for index in range(1, max_new_tokens + 1):
        chosen = ids
        if index < max_new_tokens:  # before `chosen` is read, so that the device never waits for Python
            ids, cache = advance(chosen[:, None], last, cache, index=index)
        chosen = np.asarray(chosen).tolist()
        for row in sorted(active):  # rows that have ended are still computed, but their ids are ignored
            outputs[row].append(token := chosen[row])
            if (on_token is not None and on_token(row, token)) or token == eot:
                active.discard(row)
        if not active:
            break
    return outputs


def _with_whole_sequences(model: nnx.Module) -> tuple[nnx.Module, Mesh | None]:
    """Return (model, mesh), where the devices of the mesh axis "context" have moved to the axis "data".

    This is needed because generation does not divide a sequence over several devices. The parameters stay on their
    devices, because no parameter is divided over these two axes. On a single device, the returned mesh is None.

    Raises ValueError for a model that generates no text.
    """
    jax.eval_shape(lambda: family_of(model.config).empty_cache(model.config, 1, 1))
    if (mesh := mesh_of(model)) is None or mesh.shape["context"] == 1:
        return model, mesh
    sizes = mesh.shape | {"data": mesh.shape["data"] * mesh.shape["context"], "context": 1}
    devices = np.moveaxis(mesh.devices, AXES.index("context"), 1).reshape([sizes[axis] for axis in AXES])
    mesh = Mesh(devices, AXES, axis_types=mesh.axis_types)
    return jax.device_put(model, shardings(mesh, model)), mesh


def _padded(rows: list[np.ndarray], config, max_new_tokens: int, mesh: Mesh | None):
    """Return prompts as one array of token ids [B,T], their segment ids [B,T], and an empty cache.

    `rows` has the token ids of each prompt. The cache has room for the prompts and `max_new_tokens` new tokens per row.
    A segment id is 0 for a token, and -1 for padding. Padding is on the left, so that in every decode step all rows
    write to the same position in the cache. T is the length of the longest prompt, rounded up by `padded_length`. If
    the mesh does not divide the number of prompts evenly, the last prompt is repeated.
    """
    rows = rows + [rows[-1]] * (-len(rows) % row_parts(mesh))
    T = padded_length(max(map(len, rows)))
    tokens, segment_ids = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), -1, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, T - len(ids) :], segment_ids[row, T - len(ids) :] = ids, 0
    return tokens, segment_ids, _cache(config, len(rows), padded_length(T + max_new_tokens), mesh)


def _decode_step(mesh: Mesh | None, model, tokens, segment_ids, cache):
    """Run `Family.decode_step` of the model's family, and return (logits [B,V], the new cache).

    On a mesh, the rows are sharded over the axes `stickjax.parallel.mesh.ROW_AXES`, and every device gets the logits of
    all rows.
    """
    family = family_of(model.config)

    def step(model, tokens, segment_ids, cache):
        logits, cache = family.decode_step(model, rows_of_device(tokens), rows_of_device(segment_ids), cache)
        return all_rows(logits), cache

    if mesh is None:
        return step(model, tokens, segment_ids, cache)
    whole, own = PartitionSpec(), family.cache_specs(cache)
    inputs = specs(model), whole, whole, own
    on_mesh = jax.shard_map(step, mesh=mesh, in_specs=inputs, out_specs=(whole, own), check_vma=False)
    return on_mesh(model, tokens, segment_ids, cache)


@partial(jax.jit, static_argnames=("top_k", "vocab_size", "mesh"), donate_argnames="cache")
def _advance(model, tokens, segment_ids, cache, key, index, *, temperature, top_k, top_p, vocab_size, mesh=None):
    """Run the model on `tokens` [B,T], and draw the next token of every row. Return (ids [B], the new cache).

    `segment_ids` [B,T]: -1 for padding, 0 for tokens. `cache`: the keys and values of earlier tokens. The new cache
    also has the keys and values of `tokens`. The random numbers depend on `key`, on the number of the row, and on
    `index`, the number of new tokens that each row already has. If `temperature` is None, the most likely token is
    taken. Only ids below `vocab_size` are drawn.
    """
    logits, cache = _decode_step(mesh, model, tokens, segment_ids, cache)

    def choose(logits, row):
        logits = jnp.where(jnp.arange(len(logits)) < vocab_size, logits, -jnp.inf)
        if temperature is None:
            return jnp.argmax(logits)
        own = jax.random.fold_in(jax.random.fold_in(key, row), index)
        logits = (logits - logits.max()) / temperature
        if top_k is None and top_p is None:
            return jax.random.categorical(own, logits)
        logits, ids = jax.lax.top_k(logits, top_k or len(logits))  # from the most to the least likely
        if top_p is not None:
            p = jax.nn.softmax(logits)
            likelier = jnp.cumsum(p) - p  # exactly 0 for the first token, so that this token always stays
            logits = jnp.where(likelier < top_p, logits, -jnp.inf)
        return ids[jax.random.categorical(own, logits)]

    return jax.vmap(choose)(logits, jnp.arange(len(tokens))).astype(jnp.int32), cache


def _cache(config, B: int, S: int, mesh: Mesh | None):
    """Return an empty cache for B sequences of S tokens. On a mesh, every device has a part of it.

    Raises ValueError if the cache does not fit into the free memory.
    """
    family = family_of(config)
    empty = lambda: family.empty_cache(config, B, S)  # noqa: E731
    if mesh is not None:
        places = jax.tree.map(partial(NamedSharding, mesh), family.cache_specs(jax.eval_shape(empty)))
        empty = jax.jit(empty, out_shardings=places)
    needed, free = local_bytes(jax.eval_shape(empty)), free_memory(mesh)
    if free is not None and needed > free.bytes:
        raise ValueError(
            f"a cache of {B} sequences of {S:,} tokens takes {gib(needed)}, but {gib(free.bytes)} are {free.source}; "
            "use a smaller max_new_tokens, shorter prompts or fewer prompts"
        )
    return empty()


def _options(max_new_tokens, temperature, top_k, top_p, seed, vocab_size) -> dict:
    """Check the options of `generate`, and return them as arguments of `_advance`. A temperature of 0 becomes None."""
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    if not temperature:
        return dict(vocab_size=vocab_size, temperature=None, top_k=None, top_p=None)
    temperature = max(temperature, 1e-30)  # a division by a smaller temperature would overflow
    return dict(vocab_size=vocab_size, temperature=temperature, top_k=top_k and min(top_k, vocab_size), top_p=top_p)


def _check_options(max_new_tokens, temperature, top_k, top_p, seed) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if not 0 <= seed <= SEED:
        raise ValueError(f"seed={seed} must be at least 0 and at most {SEED}")


def _prompt_ids(row: int, prompt, eot: int | None, vocab_size: int) -> np.ndarray:
    ids = np.asarray(prompt if np.size(prompt) or eot is None else [eot])
    if not ids.size:
        raise ValueError(f"prompts[{row}] is empty: give it a token, or set the end-of-text id (eot)")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompts[{row}] must be a list of token ids, not {ids.dtype}{list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"prompts[{row}] has ids from {ids.min()} to {ids.max()}, but ids must be at least 0 and below {vocab_size}"
        )
    return ids


class _TextStream:
    """Converts the new tokens of one prompt to text, token by token, and ends the text before a stop string.

    Text is held back as long as its last character is incomplete, or its end may be the beginning of a stop string.
    `stopped` is True if a stop string has ended the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str]):
        self._decoder, self._stop, self._held, self.stopped = StreamDecoder(tokenizer, prompt), stop, "", False

    def feed(self, token: int | None) -> str:
        """Add a new token id, and return the text that is no longer held back (see `_TextStream`).

        If `token` is None, the text ends: all text that was held back is returned, without an incomplete character at
        its end.
        """
        last = token is None
        self._held += self._decoder.flush().rstrip("\ufffd") if last else self._decoder.feed(token)
        # The stop string that is complete first ends the text, no matter how it is divided into tokens. If several stop
        # strings are complete after the same character, the longest one counts.
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        begun = [n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])]
        size = min(found)[1] if found else len(self._held) - (0 if last else max(begun, default=0))
        shown, self._held, self.stopped = self._held[:size], self._held[size:], bool(found)
        return shown


def _encoded(loaded: Loaded, prompts, stop, special_tokens: bool, chat: bool) -> list[np.ndarray]:
    """Check the arguments of `generate_text`, and return the token ids of each prompt."""
    if isinstance(prompts, str) or isinstance(stop, str):
        raise ValueError("prompts and stop must be lists of strings, like ['a', 'b'], not a single string")
    if isinstance(prompts, Mapping):
        raise ValueError("prompts must be a list of conversations, not a single message")
    if "" in stop:
        raise ValueError("no stop string may be empty")
    if (tokenizer := loaded.tokenizer) is None:
        raise ValueError(
            f"the tokenizer {loaded.config.data.tokenizer} of the model does not exist: set data.tokenizer to the path "
            "of its tokenizer.json, or to byte for a model of bytes"
        )
    if chat:  # the template writes a begin-of-text token if the model needs one
        texts = [chat_prompt(tokenizer.files, messages) for messages in prompts]
        return [tokenizer.prompt(text, special=True, prefix=False) for text in texts]
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(f"a prompt must be a string, not {wrong[0]!r:.80}; for a conversation, set chat=True")
    return [tokenizer.prompt(prompt, special=special_tokens) for prompt in prompts]


def generate_text(
    loaded: Loaded,
    prompts: Sequence[Conversation],
    max_new_tokens: int = 200,
    *,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    chat: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    **sampling,
) -> list[str]:
    """Return the text that follows each of B prompts.

    A text ends at an end-of-text token, before a stop string, or after `max_new_tokens` tokens.

    Args:
      loaded: the trained model with its tokenizer, from `stickjax.load(run)`.
      prompts: B strings. If the tokenizer begins every text with certain tokens, they are added before each prompt.
      max_new_tokens: the largest number of new tokens for a prompt.
      stop: strings or special tokens that end a text; the text does not contain them.
      special_tokens: if True, text such as <|user|> in a prompt is encoded as a special token, not as ordinary text.
      chat: if True, each prompt is a conversation (`stickjax.data.chat.chat_prompt`). The chat template of the model
        writes it as a prompt, whose special tokens are always encoded as special tokens.
      on_text: `on_text(row, piece)` is called with each new piece of text that follows the prompt with index `row`.
      **sampling: `temperature`, `top_k`, `top_p` and `seed` of `generate`.

    Raises ValueError as `generate` does. Also raises it if `prompts` or `stop` is a string instead of a list, if a stop
    string is empty, or if the model has no tokenizer.

    >>> from stickjax import Config, ModelConfig
    >>> from stickjax.models.transformer import init
    >>> from stickjax.data.tokenizer import ByteTokenizer
    >>> config = Config(ModelConfig(D=8, L=2, N=2, K=1, H=4, F=16))
    >>> loaded = Loaded(init(config.model, jax.random.key(0)), config, ByteTokenizer(), 0)
    >>> len(generate_text(loaded, ["one", "and another"], 8, stop=["."]))
    2
    """
    tokenizer, ids = loaded.tokenizer, _encoded(loaded, prompts, stop, special_tokens, chat)
    streams, texts = [_TextStream(tokenizer, row, stop) for row in ids], ["" for _ in prompts]
    ends = tokenizer.ends | {tokenizer.special_id(s) for s in stop}

    def on_token(row: int, token: int | None) -> bool:
        if token in ends and token is not None:
            return True
        piece = streams[row].feed(token)
        texts[row] += piece
        if piece and on_text is not None:
            on_text(row, piece)
        return streams[row].stopped

    generate(loaded.model, ids, max_new_tokens, vocab_size=tokenizer.vocab_size, on_token=on_token, **sampling)
    for row, stream in enumerate(streams):
        if not stream.stopped:
            on_token(row, None)
    return texts


def _read_prompt(path: str | None) -> str:
    """Return the text of the file `path`, or of standard input if `path` is None."""
    try:
        return sys.stdin.read() if path is None else Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        where = "standard input" if path is None else path
        raise ValueError(f"the prompt in {where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


@command
def main(argv: list[str] | None = None) -> int:
    """Run `python -m stickjax.generate` with the arguments `argv`; None: `sys.argv[1:]`. Return the exit code."""
    parser = Parser(prog="python -m stickjax.generate", description="Continue prompts with a trained model.")
    parser.add_argument("run", help="run folder, Hugging Face folder, or model on the hub: org/name")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a prompt; may be repeated; by default standard input")
    source.add_argument("--prompt-file", help="a file whose whole content is one prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token (default 0.8)")
    parser.add_argument("--top-k", type=int, help="draw only from the k most likely tokens")
    parser.add_argument("--top-p", type=float, help="draw only from the most likely tokens with this total probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this string or special token; may be repeated",
    )
    parser.add_argument("--special-tokens", action="store_true", help="encode text such as <|user|> as a special token")
    parser.add_argument("--chat", action="store_true", help="a prompt is a message of the user in a chat")
    parser.add_argument("--step", type=step_or_best, help="step of the checkpoint, or best; by default the newest")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set a config field: model.window=64"
    )
    parser.add_process_options()
    args, rest = parser.parse_with_fields(argv)
    keep_freed_memory()
    processes.initialize(args.coordinator, args.processes, args.process)
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    _check_options(args.max_new_tokens, **sampling)  # before the model is read
    if jax.process_count() > 1 and not (args.prompt or args.prompt_file):
        raise ValueError("several processes cannot all read standard input; give --prompt or --prompt-file")
    args.run = local_folder(args.run)
    changes = parse_changes(read_config(args.run), [*(f"--{word}" for word in args.set), *rest])
    prompts = args.prompt or [_read_prompt(args.prompt_file).removesuffix("\n" if args.chat else "")]
    loaded = load(args.run, step=args.step, changes=changes, mesh="run")
    one, writes = len(prompts) == 1, processes.is_writer()
    on_text = (lambda row, piece: print(piece, end="", flush=True)) if one and writes else None
    options = dict(stop=args.stop, special_tokens=args.special_tokens, chat=args.chat, on_text=on_text) | sampling
    texts = generate_text(loaded, prompts, args.max_new_tokens, **options)
    if not writes:  # process 0 prints
        return 0
    print(*() if one else (f"--- prompt {row}\n{text}" for row, text in enumerate(texts)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
