"""Make and verify token files, which are tokenized texts on disk.

The commands are `python -m stickjax.data tokenize SOURCE OUT` and `python -m stickjax.data verify OUT`.
"""

import sys

from stickjax.config.command import Parser, command
from stickjax.data.token_files import tokenize, verify
from stickjax.system.text import printable


@command
def main(argv: list[str] | None = None) -> None:
    """Run `tokenize` or `verify` with the arguments `argv`; None: take them from `sys.argv`.

    `tokenize SOURCE OUT [--tokenizer byte|tokenizer.json] [--eot TOKEN] [--text-field text]` converts the text SOURCE
    to the token file OUT. `verify OUT` computes the sha256 of a token file, and compares it with the sha256 that
    `tokenize` recorded. Both commands print the numbers of documents, tokens and bytes.
    """
    parser = Parser(prog="python -m stickjax.data")
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("tokenize", help="write the tokens of a text to a token file")
    one.add_argument("source", metavar="SOURCE", help="text file, .jsonl file or folder")
    one.add_argument("out", metavar="OUT", help="name of the token file; writes OUT.bin and OUT.json")
    one.add_argument("--tokenizer", default="byte", help="byte, or the path of a tokenizer.json")
    one.add_argument(
        "--eot", help="added token that ends a text (default: the token that the tokenizer's folder names)"
    )
    one.add_argument("--text-field", default="text", help="field of a jsonl line that holds the text")
    one = commands.add_parser("verify", help="read a token file and compare it with its sha256")
    one.add_argument("out", metavar="OUT", help="the token file OUT.bin with its OUT.json")
    words = vars(parser.parse_args(argv))
    meta = verify(words["out"], "OUT") if words.pop("command") == "verify" else tokenize(**words)
    counts = (f"{meta['num_' + what]:,} {what}" for what in ("documents", "tokens", "bytes"))
    print(f"{printable(words['out'])}: {', '.join(counts)}, {meta['sha256'][:16]}")


if __name__ == "__main__":
    sys.exit(main())
