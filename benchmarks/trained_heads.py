"""Save the queries and keys of all attention heads of a trained model on held-out text, as inputs of the benchmarks.

python -m benchmarks.trained_heads [RUN] [--tokens N] [--out PATH]

RUN is the run folder of a trained model, such as runs/tiny from `make demo`. The command writes the file
runs/trained_heads.npz, which benchmarks/trained_logits.py reads. It also prints the fraction of the attention tiles
that are computed with `skip_below`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import stick_breaking_attention
from stickjax import load
from stickjax.config.command import Parser, command
from stickjax.data.corpus import load_corpus
from stickjax.models.attention import Context

from .trained_logits import SAVED, SKIP, Heads


def of_model(model, tokens) -> Heads:
    """Return the queries and keys of all heads of all layers of a stick-breaking model, computed on P tokens.

    `tokens` [P]: the tokens, which are read as one document. Raises ValueError if the model does not use stick-breaking
    attention, or if it has attention experts.
    """
    c = model.config
    if c.attention != "stick_breaking":
        raise ValueError(f"trained_heads needs stick-breaking attention, but the model has attention={c.attention!r}")
    if c.attention_experts.E:
        raise ValueError(f"trained_heads needs a model with attention_experts.E=0, got E={c.attention_experts.E}")

    @jax.jit
    def layer(block, x):
        q, k = (
            jnp.einsum("BTD,DNH->NTH", block.attention_norm(x), w[...].astype(c.dtype))
            for w in (block.attention.query, block.attention.key)
        )
        context = Context(None, None, None, 0)
        return block(x, context, None, None, None)[0], (q * c.scale, jnp.repeat(k, c.N // c.K, axis=0))

    x, found = c.m_emb * model.embed[...].astype(c.dtype)[jnp.asarray(tokens)[None]], []
    for i in range(c.L):
        x, heads = layer(jax.tree.map(lambda p, i=i: p[i], model.blocks), x)
        found.append(jax.tree.map(np.asarray, heads))
    return Heads(*map(np.concatenate, zip(*found, strict=True)))


def kept(heads: Heads, T: int) -> np.ndarray:
    """Return, for each of the heads, the fraction of the visible tiles that are computed with skip_below=SKIP.

    The heads attend to the first T tokens of their text. A tile has 64 queries and 64 keys. It is visible if one of
    its queries may attend to one of its keys. The visible tiles where almost nothing of the stick remains are skipped.
    """
    q, k = (jnp.asarray(x[:, :T]).swapaxes(0, 1)[None] for x in heads)
    settings = dict(skip_below=SKIP, tiles=(64, 64), scale=1.0, return_stats=True, implementation="xla")
    return np.asarray(jax.jit(lambda q, k: stick_breaking_attention(q, k, k, **settings)[2].kept[0])(q, k))


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.trained_heads", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/tiny", help="run folder of a trained model (default runs/tiny)")
    parser.add_argument("--tokens", type=int, default=2**14, help="number of held-out tokens (default 16384)")
    parser.add_argument("--out", type=Path, default=SAVED, help="file to write (default runs/trained_heads.npz)")
    arguments = parser.parse_args(argv)
    loaded = load(arguments.run)
    tokens = load_corpus(loaded.config.data)[1].tokens[: arguments.tokens]
    heads = of_model(loaded.model, tokens)
    title = f"fraction of the 64 x 64 tiles that a head computes with skip_below={SKIP:g}"
    table = Table("T", "mean", "lowest", "highest", title=title)
    for T in sorted({min(T, len(tokens)) for T in (1024, 2048, 4096, len(tokens))}):
        shares = kept(heads, T)
        table.add_row(str(T), *(f"{x:.0%}" for x in (shares.mean(), shares.min(), shares.max())))
    Console(highlight=False).print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    whole = arguments.out.with_suffix(".tmp")  # written first and then renamed, so that the file is always complete
    with whole.open("wb") as file:
        np.savez(file, query=heads.query.astype(np.float16), key=heads.key.astype(np.float16))
    whole.replace(arguments.out)
    print(f"wrote {heads.key.shape[0]} heads on {heads.key.shape[1]} tokens to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
