"""Train a tokenizer, and make and verify token files, which are tokenized texts on disk.

The commands are `python -m stickjax.data tokenizer PATH`, `python -m stickjax.data tokenize SOURCE OUT` and
`python -m stickjax.data verify OUT`.
"""

import sys
from pathlib import Path

from stickjax.config.command import Parser, command
from stickjax.data.token_files import tokenize, verify
from stickjax.data.train_tokenizer import train_tokenizer
from stickjax.system.text import printable


def _parser() -> Parser:
    parser = Parser(prog="python -m stickjax.data")
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer and write a tokenizer.json")
    one.add_argument("source", metavar="PATH", help="text, .jsonl, .parquet or .arrow file, or folder")
    one.add_argument("--vocab", type=int, default=8192, help="number of tokens, at least 257 (default: 8192)")
    one.add_argument(
        "--out", dest="folder", metavar="FOLDER", default=".", help="folder of tokenizer.json (default: current folder)"
    )
    _add_text_field(one)
    one = commands.add_parser("tokenize", help="write the tokens of a text to a token file")
    one.add_argument("source", metavar="SOURCE", help="text, .jsonl, .parquet or .arrow file, or folder")
    one.add_argument("out", metavar="OUT", help="name of the token file; writes OUT.bin and OUT.json")
    one.add_argument("--tokenizer", default="byte", help="byte, or the path of a tokenizer.json")
    one.add_argument(
        "--eot", help="added token that ends a text (default: the token that the tokenizer's folder names)"
    )
    _add_text_field(one)
    one = commands.add_parser(
        "verify", help="compare the sha256 of a token file with the sha256 that tokenize recorded"
    )
    one.add_argument("out", metavar="OUT", help="the token file OUT.bin with its OUT.json")
    return parser


def _add_text_field(parser: Parser) -> None:
    parser.add_argument(
        "--text-field", default="text", help="field of a jsonl line, or column of a parquet file, that holds the text"
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Run `tokenizer`, `tokenize` or `verify` with the arguments `argv`; None: take them from `sys.argv`.

    `tokenizer PATH [--vocab 8192] [--out FOLDER] [--text-field text]` trains a tokenizer on the text PATH, writes
    FOLDER/tokenizer.json, and prints the vocabulary size and the name of the tokenizer.

    `tokenize SOURCE OUT [--tokenizer byte|tokenizer.json] [--eot TOKEN] [--text-field text]` converts the text SOURCE
    to the token file OUT. `verify OUT` computes the sha256 of a token file, and compares it with the sha256 that
    `tokenize` recorded. Both commands print the numbers of documents, tokens and bytes.
    """
    words = vars(_parser().parse_args(argv))
    chosen = words.pop("command")
    if chosen == "tokenizer":
        tokenizer = train_tokenizer(**words, name="PATH")
        print(
            f"{printable(Path(words['folder'], 'tokenizer.json'))}: {tokenizer.vocab_size:,} tokens, {tokenizer.name}"
        )
        return
    meta = verify(words["out"], "OUT") if chosen == "verify" else tokenize(**words)
    counts = (f"{meta['num_' + what]:,} {what}" for what in ("documents", "tokens", "bytes"))
    print(f"{printable(words['out'])}: {', '.join(counts)}, {meta['sha256'][:16]}")


if __name__ == "__main__":
    sys.exit(main())
