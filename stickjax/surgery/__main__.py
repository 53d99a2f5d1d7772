"""Change the modules (experts) of a trained run: add, freeze, concentrate, prune; report which text uses which module.

python -m stickjax.surgery extend RUN OUT --experts 8 [--attention-experts 4] [--routing frozen|full]
python -m stickjax.surgery freeze RUN OUT PATTERN [PATTERN ...]
python -m stickjax.surgery concentrate RUN OUT [--weight 0.1]
python -m stickjax.surgery prune RUN OUT (--count N | --threshold X) [--kind ffn|attention|both] [--denominator old|new]
python -m stickjax.surgery report RUN [--source stdlib --source text:FOLDER] [--plot PNG]

concentrate trains the model of RUN further, so that it uses few modules. Then prune can remove the other modules.
extend, freeze and prune write a folder OUT with parameters, but without an optimizer state. The command
python -m stickjax.train OUT/config.json --run NEW --init-from OUT trains the model in OUT.
All commands also take changes of config fields: --section.field=value.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
from rich.table import Table

from stickjax.config import DataConfig
from stickjax.config.command import SEED_TYPE, Parser, command, number, step_or_best
from stickjax.config.command_line import parse_changes
from stickjax.evaluation import plots
from stickjax.storage.hub import local_folder
from stickjax.storage.run_config import read_config
from stickjax.storage.run_folder import load, results_folder, save
from stickjax.surgery.change import extend, prune
from stickjax.surgery.kinds import KINDS, kinds_of
from stickjax.surgery.tune import TRAINABLE, concentrate, freeze, frozen
from stickjax.surgery.usage import batches_of, report, use
from stickjax.system.disk import write_file
from stickjax.system.tables import print_table
from stickjax.system.text import json_text


def source_of(data: DataConfig, words: str) -> DataConfig:
    """Return a copy of the data config `data` that reads only one source of text.

    `words` names the source as the option `--source` does: "stdlib" or "text:PATH". If `words` has no path, but `data`
    has this source, the copy keeps the path of the source.

    >>> source_of(DataConfig(source="stdlib,logic"), "logic").source
    'logic'
    """
    source, _, path = words.partition(":")
    if source in data.sources and not path:
        heldout = data.heldout_path if len(data.sources) == 1 else None
        return dataclasses.replace(
            data, source=source, path=data.path if source in ("text", "tokens") else None, heldout_path=heldout
        )
    return dataclasses.replace(data, source=source, path=path or None, heldout_path=None, mixture=None)


def table(result: dict) -> Table:
    """Return `result`, the result of `usage.report`, as a table with a row for each kind of modules (experts).

    The columns have the number of modules, the number of modules that each source does not use, and the mutual
    information of modules and sources in bits. The two numbers of modules are sums over the layers. The mutual
    information is one number for each layer.
    """
    shown = Table(title=f"modules, on {result['max_tokens']} held-out tokens of each source")
    shown.add_column("kind")
    for column in ("modules", *(f"unused by {source}" for source in result["use"]), "bits about the source, by layer"):
        shown.add_column(column, justify="right")
    for kind, bits in result["mutual_information"].items():
        unused = (str(of[kind]) for of in result["unused"].values())
        shown.add_row(kind, str(result["modules"][kind]), *unused, " ".join(f"{b:.3f}" for b in bits))
    return shown


def _how_to_train(out: str) -> str:
    return f"{out}: train this model by python -m stickjax.train {out}/config.json --run NEW --init-from {out}"


def _extend(words, changes: dict) -> str:
    loaded = load(words.run)
    added = dict(experts=words.experts, attention_experts=words.attention_experts)
    model = extend(loaded.model, jax.random.key(words.seed), **added)
    changes = {"optim.trainable": TRAINABLE[words.routing]} | changes
    save(words.out, model, dataclasses.replace(loaded.config, model=model.config).replace(changes))
    return _how_to_train(words.out)


def _freeze(words, changes: dict) -> str:
    loaded = load(words.run, changes=changes)
    config = freeze(loaded.config, ",".join(words.patterns))
    mask = jax.tree.leaves(frozen(loaded.model, config.optim.trainable))
    if all(mask):
        raise ValueError(
            f"optim.trainable={config.optim.trainable!r} freezes every parameter: nothing would be trained"
        )
    save(words.out, loaded.model, config)
    return f"{sum(mask)} of {len(mask)} parameters are frozen; {_how_to_train(words.out)}"


def _prune(words, changes: dict) -> str:
    loaded = load(words.run, changes=changes)
    kinds = [kind.name for kind in kinds_of(loaded.config.model) if words.kind in (kind.name, "both")]
    if not kinds:
        raise ValueError(f"{words.run} has no {words.kind} modules (experts): choose another --kind")
    counts = {kind: 0 for kind in kinds}
    for source in words.source or loaded.config.data.sources:
        data = source_of(loaded.config.data, source)
        found = use(loaded.model, batches_of(data, heldout=False, max_tokens=words.tokens))
        counts = {kind: counts[kind] + found[kind] for kind in kinds}
    model = prune(loaded.model, counts, count=words.count, threshold=words.threshold, denominator=words.denominator)
    before, config = loaded.config.model, dataclasses.replace(loaded.config, model=model.config)
    if any(mixture.added for mixture in before.mixtures().values()):
        # `prune` has merged the added modules into the old ones, so the pattern "*.new_*" would match nothing.
        config = config.replace({"optim.trainable": "*"} | changes)
    save(words.out, model, config)
    kept = ", ".join(f"at most {KINDS[kind].mixture(model.config).E} {kind} modules in a layer" for kind in kinds)
    return f"{words.out} keeps {kept}"


def _concentrate(words, changes: dict) -> str | int:
    result = concentrate(words.run, words.out, weight=words.weight, changes=changes)
    if result.stopped_by:
        return 128 + result.stopped_by
    return f"{words.out}: remove the unused modules by python -m stickjax.surgery prune {words.out} NEW --threshold X"


def _report(words, changes: dict) -> str:
    loaded = load(words.run, step=words.step, changes=changes)
    sources = {name: source_of(loaded.config.data, name) for name in words.source or loaded.config.data.sources}
    result = report(loaded.model, sources, max_tokens=words.tokens, below=words.below)
    print_table(table(result))
    place = results_folder(Path(words.run))
    if place:
        write_file(place / "modules.json", json_text({"step": loaded.step} | result) + "\n")
    if not (picture := words.plot or (place and place / "modules.png")):
        return "no picture was written: give its path by --plot PNG"
    plots.plot_module_use(result["use"], result["mutual_information"], picture)
    return f"picture: {picture}"


def _parser() -> Parser:
    parser = Parser(prog="python -m stickjax.surgery")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, doc, out=True):
        added = commands.add_parser(name, help=doc, description=doc)
        added.set_defaults(function=function)
        added.add_argument("run", metavar="RUN", help="run folder of a trained model")
        if out:
            added.add_argument("out", metavar="OUT", help="run folder to write")
        return added

    def read(added, doc):
        added.add_argument(
            "--source", action="append", metavar="SOURCE[:PATH]", help=f"{doc}; default: the sources of RUN"
        )
        added.add_argument(
            "--tokens", type=number(int, at_least=1), default=2**15, help="about how many tokens to read of each source"
        )

    added = command("extend", _extend, "add modules to every layer")
    added.add_argument(
        "--experts", type=number(int, at_least=0), default=0, help="modules to add to each feed-forward network"
    )
    added.add_argument(
        "--attention-experts", type=number(int, at_least=0), default=0, help="modules to add to each attention layer"
    )
    added.add_argument(
        "--routing", choices=TRAINABLE, default="frozen", help="full: the old router columns are trainable, too"
    )
    added.add_argument("--seed", type=SEED_TYPE, default=0, help="random seed of the new parameters")
    added = command("freeze", _freeze, "make only a part of the model trainable")
    added.add_argument(
        "patterns", nargs="+", metavar="PATTERN", help="freeze the parameters with these names: '*.router.*' or embed"
    )
    added = command("prune", _prune, "remove the modules that are used least")
    how = added.add_mutually_exclusive_group(required=True)
    how.add_argument("--count", type=int, help="number of modules of each kind that a layer keeps")
    how.add_argument(
        "--threshold", type=float, help="keep modules with at least this share of their layer's (token, choice) pairs"
    )
    added.add_argument("--kind", choices=("ffn", "attention", "both"), default="both", help="kind of modules to prune")
    added.add_argument(
        "--denominator", choices=("old", "new"), default="old", help="old: router softmax still includes pruned modules"
    )
    read(added, "training text for which the use is counted")
    added = command("concentrate", _concentrate, "fine-tune with the load-concentration loss; the same command resumes")
    added.add_argument("--weight", type=float, default=0.1, help="weight of the load-concentration loss")
    added = command("report", _report, "show which text uses which modules", out=False)
    read(added, "held-out text to compare")
    added.add_argument("--step", type=step_or_best, help="report on the checkpoint of this step, or best")
    share = number(float, at_least=0, at_most=1)
    added.add_argument(
        "--below",
        type=share,
        default=0.01,
        help="a module with a smaller share of its layer's (token, choice) pairs is unused",
    )
    added.add_argument("--plot", metavar="PNG", help="path of the picture; RUN/modules.png by default")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    words, rest = _parser().parse_with_fields(argv)
    if "out" in words and words.function is not _concentrate and Path(words.out).exists():
        raise ValueError(f"{words.out} exists; choose another folder")
    words.run = os.fspath(local_folder(words.run))
    result = words.function(words, parse_changes(read_config(words.run), rest))
    if isinstance(result, int):  # the exit code of a training that was stopped
        return result
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
