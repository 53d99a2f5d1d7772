"""Measure how far modules specialise, how much pruning raises the loss, and what a model forgets in further training.

A module is an expert of the feed-forward network or of the attention.

python -m benchmarks.modularity [--seeds 3] [--json] [--section.field=value ...]

For each seed, a model of configs/moduleformer_tiny.py is trained on a mixture of two text sources. There are three
experiments:
1. Specialisation: the mutual information, in bits, between the source of a token and the module that the token uses. It
   is measured at several steps of this training.
2. Pruning: the model is trained further on the first source, with a loss that concentrates the tokens on few modules.
   Then half of the attention modules and half of the feed-forward modules are pruned, either the least used modules or
   random modules. The result is the increase of the held-out loss on this source.
3. Forgetting: the model of the first training is trained further on a third source, in two ways. Either new modules
   are added and only these are trained, or the whole model is trained. The result is the increase of the held-out loss
   on the first two sources.
Every further training has a third of the steps of the first training. Losses are held-out bits per token.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from stickjax.config import Config
from stickjax.config.command import Parser, command
from stickjax.config.command_line import load_config, parse
from stickjax.evaluate import evaluate
from stickjax.evaluation import plots
from stickjax.storage.run_folder import Loaded, load, save
from stickjax.surgery import TRAINABLE, extend, prune, report, use
from stickjax.surgery.usage import batches_of
from stickjax.train import fit
from stickjax.training.step import init_state

RESULTS = Path(__file__).parent / "results" / "modularity.json"
CONFIG = Path(__file__).parent.parent / "configs" / "moduleformer_tiny.py"
NEW = "listops"
# The number of held-out tokens of each source for a loss, and of training tokens to count how often modules are used.
TOKENS = 2**14


def loss(model, config: Config, source: str) -> float:
    """Return the loss in bits per token on held-out text of a source, in windows of config.data.T tokens."""
    config = config.replace({"data.source": source})
    return evaluate(model, config, lengths=(1,), max_tokens=TOKENS)[0]["bits_per_token"]


def follow(run: str, config: Config, steps: list[int]) -> list[dict]:
    """Return the mutual information between the source of a token and its module, at some steps of a run.

    `run`: the run folder. `config`: the config of the run, which names the sources. `steps`: steps with a checkpoint,
    and 0 for the model before the training. The result has a dictionary for each step: {"step": .., "attention": ..,
    "ffn": ..}. The entries "attention" and "ffn" are the mutual information in bits, averaged over the layers.
    """
    sources = {name: config.replace({"data.source": name}).data for name in config.data.sources}
    found = []
    for step in steps:
        model = load(run, step=step).model if step else init_state(config, jax.random.key(config.train.seed)).params
        result = report(model, sources, max_tokens=TOKENS)
        found.append({"step": step} | {kind: float(np.mean(b)) for kind, b in result["mutual_information"].items()})
    return found


def trained(loaded: Loaded, config: Config, changes: dict, folder: Path, name: str) -> Loaded:
    """Train a model further, for a third of `config.train.steps`, and return the trained model.

    `loaded`: the model at the start. `changes`: {field: value}, changes to `config`. The new run is written to the run
    folder `folder / name`.
    """
    steps = max(1, config.train.steps // 3)
    quarter = steps * config.data.tokens_per_step // 4
    config = config.replace(
        {"train.steps": steps, "train.checkpoint_every": steps, "model.experts.mi_weight": 0.0}
        | {"optim.warmup_tokens": quarter, "optim.decay_tokens": quarter}
        | changes
    )
    start, run = str(folder / f"{name}-start"), str(folder / name)
    save(start, loaded.model, loaded.config)
    fit(config, run, init_from=start, quiet=True)
    return load(run)


def pruned(model, config: Config, source: str, rng: np.random.Generator | None):
    """Prune half of the attention modules and half of the feed-forward modules. Return the smaller model.

    The modules that the tokens of `source` use most are kept. If `rng` is given, random modules are kept instead.
    """
    data = config.replace({"data.source": source}).data
    counts = use(model, batches_of(data, heldout=False, max_tokens=TOKENS))
    if rng is not None:
        counts = {kind: rng.permuted(np.tile(np.arange(c.shape[1]), (len(c), 1)), axis=1) for kind, c in counts.items()}
    return prune(model, counts, count={kind: c.shape[1] // 2 for kind, c in counts.items()})


def one(config: Config, seed: int, folder: Path) -> dict:
    """Train a model with one seed, run the three experiments with it, and return the results as a dictionary for JSON.

    The run folders are written into `folder`.
    """
    steps = sorted({max(1, config.train.steps * i // 6) for i in range(1, 7)})
    config = config.replace({"train.seed": seed, "data.seed": seed, "train.keep": len(steps)})
    config = config.replace({"train.checkpoint_every": max(1, config.train.steps // 6)})
    run = str(folder / "base")
    fit(config, run, quiet=True)
    base, (first, *_) = load(run), config.data.sources
    result: dict = {"seed": seed, "information": follow(run, config, [0, *steps])}
    before = {name: loss(base.model, config, name) for name in (*config.data.sources, NEW)}

    alone = {"data.source": first, "model.experts.concentration_weight": 0.1}
    few = trained(base, config, alone, folder, "concentrated")
    result["concentrated"] = {
        "whole": loss(few.model, config, first),
        "by use": loss(pruned(few.model, config, first, None), config, first),
        "at random": loss(pruned(few.model, config, first, np.random.default_rng(seed)), config, first),
    }
    third = {"data.source": NEW}
    E, A = config.model.experts.E // 2, config.model.attention_experts.E // 2
    wider = extend(base.model, jax.random.key(seed), experts=E, attention_experts=A)
    sizes = {"model.experts.added": E, "model.attention_experts.added": A}
    models = {
        "extended": (
            Loaded(wider, config.replace(sizes), base.tokenizer, 0),
            {"optim.trainable": TRAINABLE["frozen"]} | sizes,
        ),
        "fine-tuned": (base, {}),
    }
    for name, (start, changes) in models.items():
        after = trained(start, config, third | changes, folder, name)
        losses = {source: loss(after.model, config, source) for source in before}
        forgotten = float(np.mean([losses[source] - before[source] for source in config.data.sources]))
        result[name] = {"forgotten": forgotten, "new": losses[NEW]}
    return result | {"before": before}


def statistics(results: list[dict]) -> dict[str, tuple[float, float]]:
    """Return {main result of an experiment: (mean over the seeds, standard error of the mean)}.

    `results`: the dictionary that `one` returned for each seed. The main results are: the rise of the mutual
    information during the training; the loss after random pruning, minus the loss after pruning by use; and the
    forgetting if the whole model is trained further, minus the forgetting if only new modules are trained. Forgetting
    is the increase of the held-out loss on the first two sources.
    """
    pairs = {
        "rise in bits about the source": [
            np.mean([r["information"][-1][kind] - r["information"][0][kind] for kind in ("attention", "ffn")])
            for r in results
        ],
        "pruned at random, less by use": [
            r["concentrated"]["at random"] - r["concentrated"]["by use"] for r in results
        ],
        "forgotten by fine-tuning, less by extension": [
            r["fine-tuned"]["forgotten"] - r["extended"]["forgotten"] for r in results
        ],
    }
    root = math.sqrt(len(results))
    return {
        name: (float(np.mean(x)), float(np.std(x, ddof=1) / root) if len(x) > 1 else math.nan)
        for name, x in pairs.items()
    }


def table(results: list[dict]) -> Table:
    title = "losses: bits per token; bits about the source: per (token, choice) pair"
    shown = Table("", "mean", "standard error", "by seed", title=title)
    columns = {
        "bits about the source, first": lambda r: np.mean([r["information"][0][k] for k in ("attention", "ffn")]),
        "bits about the source, last": lambda r: np.mean([r["information"][-1][k] for k in ("attention", "ffn")]),
        **{f"concentrated, {how}": (lambda r, how=how: r["concentrated"][how]) for how in results[0]["concentrated"]},
        **{f"{how}: forgotten": (lambda r, how=how: r[how]["forgotten"]) for how in ("extended", "fine-tuned")},
        **{f"{how}: {NEW}": (lambda r, how=how: r[how]["new"]) for how in ("extended", "fine-tuned")},
        f"before: {NEW}": lambda r: r["before"][NEW],
    }
    for name, of in columns.items():
        values = [float(of(r)) for r in results]
        error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        shown.add_row(name, f"{np.mean(values):.3f}", f"{error:.3f}", " ".join(f"{v:.3f}" for v in values))
    shown.add_section()
    for name, (mean, error) in statistics(results).items():
        shown.add_row(name, f"{mean:.3f}", f"{error:.3f}", f"{mean / error:.1f} standard errors" if error else "")
    return shown


def plot(results: list[dict], path) -> None:
    """Plot the results of the three experiments, with one line per seed, and save the picture at `path`.

    `results`: the dictionary that `one` returned for each seed.
    """
    page, panels = plots.figure("", "", ("bits about the source", "cost of pruning half", "forgotten"), share=False)
    for r in results:
        for i, kind in enumerate(("attention", "ffn")):
            steps, bits = zip(*((at["step"], at[kind]) for at in r["information"]), strict=True)
            panels[0].plot(steps, bits, ".-", color=f"C{i}", label=kind if r is results[0] else None)
        costs = [r["concentrated"][how] - r["concentrated"]["whole"] for how in ("by use", "at random")]
        panels[1].plot(("by use", "at random"), costs, "o-", label=f"seed {r['seed']}")
        panels[2].plot(("extended", "fine-tuned"), [r[how]["forgotten"] for how in ("extended", "fine-tuned")], "o-")
    for axes, label in zip(panels, ("step", "bits per token", "bits per token"), strict=True):
        axes.set_xlabel(label if axes is panels[0] else "")
        axes.set_ylabel("bits" if axes is panels[0] else label)
    panels[0].legend()
    panels[1].legend()
    page.savefig(path)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.modularity", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0 (default 3)")
    parser.add_argument("--json", action="store_true", help=f"write benchmarks/results/{RESULTS.name} and a picture")
    words, rest = parser.parse_with_fields(argv)
    results: list[dict] = []
    config = parse(load_config(str(CONFIG)), rest)
    for seed in range(words.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results.append(one(config, seed, Path(folder)))
        Console(highlight=False).print(table(results))
    if words.json:
        found = {"config": config.to_dict(), "statistics": statistics(results), "seeds": results}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        plot(results, RESULTS.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
