"""Plot results: learning curves, loss against context length, attention weights, halting, learning rates.

Matplotlib is imported only when a plot is made. `Records` are results: a list of dictionaries with the same keys.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stickjax.system.disk import write_file

Records = list[dict[str, Any]]


def figure(xlabel: str, ylabel: str, titles=("",), *, xscale=None, yscale=None, share=True):
    """Return (a new Matplotlib figure, its panels). The panels are Axes in one row, one for each of `titles`.

    `xscale` is the scale of the horizontal axis: the name of a Matplotlib scale, or a pair (name, options). `yscale` is
    the scale of the vertical axis, in the same form. With `share`, all panels have the same axis limits. pyplot is not
    used, because its state is global.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(1 + 4.5 * len(titles), 4), dpi=150, layout="constrained")
    panels = page.subplots(1, len(titles), sharex=share, sharey=share, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlabel=xlabel, title=title)
        for scale, set_scale in ((xscale, axes.set_xscale), (yscale, axes.set_yscale)):
            if scale:
                name, options = (scale, {}) if isinstance(scale, str) else scale
                set_scale(name, **options)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(ylabel)
    return page, panels


def save(page, path) -> None:
    """Write a Matplotlib figure to a path, or as PNG to an open file.

    The ending of the path decides the format. Without an ending, the format is PNG. The file appears at the path only
    when it is complete.
    """
    if hasattr(path, "write"):
        page.savefig(path)
        return
    content = io.BytesIO()
    page.savefig(content, format=Path(path).suffix[1:] or None)
    write_file(path, content.getvalue())


def ticks(axes, values) -> None:
    """Put the ticks of the horizontal axis exactly at `values`, with plain numbers as labels."""
    axes.set_xticks(sorted(values), [f"{v:.10g}" for v in sorted(values)])
    axes.xaxis.minorticks_off()


def group(records: Records, *keys: str) -> dict[Any, Records]:
    """Divide records into groups: return {value of a key: the records with this value}, in order of appearance.

    If there are several `keys`, the groups are {tuple of their values: the records with these values}.
    """
    groups: dict[Any, Records] = {}
    for record in records:
        value = tuple(record[key] for key in keys)
        groups.setdefault(value if len(keys) > 1 else value[0], []).append(record)
    return groups


def best_runs(records: Records, *keys: str) -> Records:
    """Return the record with the smallest "loss" for every combination of values of `keys`.

    Records whose loss is not finite are ignored, because their runs have diverged. A combination of values is left out
    if none of its records has a finite loss.
    """
    groups = group([r for r in records if math.isfinite(r["loss"])], *keys)
    return [min(line, key=lambda r: r["loss"]) for line in groups.values()]


def label(name: str) -> str:
    """Return a text for `name` that a Matplotlib legend shows as it is.

    Matplotlib reads text between two dollar signs as a formula, and does not show a name that begins with _. So a
    backslash is put before every dollar sign, and a space is put before a _ at the beginning.

    >>> label("_lr$3")
    ' _lr\\\\$3'
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_length_curves(runs: dict[str, Records], path) -> None:
    """Plot held-out bits per byte against the context length, with a line per run and a mark at the training length.

    `runs` is {name of a run: the records of `evaluate`}.
    """
    page, (axes,) = figure("context length (tokens)", "held-out bits per byte", xscale=("log", dict(base=2)))
    for name, records in runs.items():
        axes.plot([r["context"] for r in records], [r["bits_per_byte"] for r in records], "o-", label=label(name))
    contexts = {r["context"] for records in runs.values() for r in records}
    trained = sorted({r["context"] for records in runs.values() for r in records if r["multiple"] == 1})
    for T in trained:
        legend = {"label": "training length"} if T == trained[0] else {}
        axes.axvline(T, color="k", linestyle=":", alpha=0.5, **legend)
    ticks(axes, contexts)
    axes.legend()
    save(page, path)


def plot_training(runs: dict[str, Records], path) -> None:
    """Plot the training loss in bits per token, and the learning rate, against the number of training tokens.

    If rows have a held-out loss, it is a second curve beside the training loss. If rows have the accuracy on the
    validation examples, it is a curve in a third panel.

    `runs` is {name of a run: the rows of its metrics.jsonl, as dictionaries}.
    """
    titles = ["training loss (bits per token)", "learning rate"]
    titles += ["validation accuracy"] if any("valid_accuracy" in r for rows in runs.values() for r in rows) else []
    page, panels = figure("tokens", "", titles, share=False)
    for name, rows in runs.items():
        tokens = [r["tokens"] for r in rows]
        (line,) = panels[0].plot(tokens, [r["loss"] / math.log(2) for r in rows], label=label(name), linewidth=1)
        style = dict(color=line.get_color(), linestyle="--", marker=".")
        if heldout := [r for r in rows if "heldout_loss" in r]:
            losses = [r["heldout_loss"] / math.log(2) for r in heldout]
            panels[0].plot([r["tokens"] for r in heldout], losses, label=label(f"{name}, held out"), **style)
        if valid := [r for r in rows if "valid_accuracy" in r]:
            panels[2].plot([r["tokens"] for r in valid], [r["valid_accuracy"] for r in valid], **style)
        panels[1].plot(tokens, [r["learning_rate"] for r in rows], label=label(name))
    panels[0].legend()
    save(page, path)


def plot_attention(weights: np.ndarray, path, labels: list[str] | None = None) -> None:
    """Plot attention weights [N,T,S] of N query heads as images, with a panel per head.

    The T queries are the rows of an image, and the S keys are the columns. `labels` are the tokens as text. They label
    both axes, so T must be equal to S. None: no labels.
    """
    page, panels = figure("key", "query", [f"head {n}" for n in range(len(weights))])
    for axes, weight in zip(panels, weights, strict=True):
        image = axes.imshow(np.asarray(weight), vmin=0, vmax=1, cmap="viridis")
        axes.grid(visible=False)
        if labels:
            ticks = range(len(labels))
            axes.set_xticks(ticks, labels, family="monospace", fontsize="x-small")
            axes.set_yticks(ticks, labels, family="monospace", fontsize="x-small")
    page.colorbar(image, ax=list(panels), label="weight", shrink=0.8)
    save(page, path)


def plot_accuracy(runs: dict[str, Records], path, xlabel: str = "operators") -> None:
    """Plot the accuracy against the bucket, such as the number of logical operators, with a line per run.

    If the examples have labels, a dotted line shows the fraction of examples with the most frequent label. A model that
    ignores its input can reach this accuracy. `runs` is {name of a run: the records of `examples.accuracy`, or of
    `pairs.accuracy` at one halting threshold}.
    """
    page, (axes,) = figure(xlabel, "held-out accuracy")
    for name, records in runs.items():
        axes.plot([r["bucket"] for r in records], [r["accuracy"] for r in records], "o-", label=label(name))
    if "majority" in records[0]:
        axes.plot([r["bucket"] for r in records], [r["majority"] for r in records], "k:", label="commonest label")
    axes.set_ylim(0, 1)
    axes.legend()
    save(page, path)


def plot_halting(records: Records, path, groups=((0, 6), (7, 9), (10, 12))) -> None:
    """Plot accuracy against mean depth (blocks per token), with a point per halting threshold.

    The pairs of sentences are grouped by their number of logical operators, and there is a line for each group.
    `groups` has the pair (smallest number of operators, largest number of operators) of each group. `records` are the
    records of `pairs.accuracy`.
    """
    page, (axes,) = figure("mean depth (blocks)", "held-out accuracy")
    for low, high in groups:
        line = []
        for threshold, part in group([r for r in records if low <= r["bucket"] <= high], "threshold").items():
            pairs = sum(r["pairs"] for r in part)
            mean = {name: sum(r[name] * r["pairs"] for r in part) / pairs for name in ("depth", "accuracy")}
            line.append((mean["depth"], mean["accuracy"], threshold))
        if line:
            axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "o-", label=f"{low} to {high} operators")
            for i, (x, y, threshold) in enumerate(line):  # labels above and below in turn, as points may be close
                place = dict(textcoords="offset points", xytext=(4, 6 if i % 2 else -10), fontsize="x-small")
                axes.annotate(f"{threshold:g}", (x, y), **place)
    axes.margins(x=0.1)  # room for the numbers on the right
    axes.legend(title="number: threshold")
    save(page, path)


def plot_depth(sentences: list[tuple[list[str], np.ndarray]], path) -> None:
    """Plot the depth of every token as a bar, with a row per sentence.

    `sentences` is a list of (tokens as text, array with the depth of each token). The depth of a token is the expected
    number of blocks that are applied to it, given its halting probabilities.
    """
    from matplotlib.figure import Figure

    longest = max(len(tokens) for tokens, _ in sentences)
    page = Figure(figsize=(2 + 0.28 * longest, 0.5 + 0.75 * len(sentences)), dpi=150, layout="constrained")
    panels = page.subplots(len(sentences), 1, squeeze=False)[:, 0]
    highest = max(depth.max() for _, depth in sentences)
    for axes, (tokens, depth) in zip(panels, sentences, strict=True):
        axes.bar(range(len(tokens)), depth, color="C0")
        axes.set(xlim=(-0.6, longest - 0.4), ylim=(0, highest), ylabel="depth")
        labels = [token.replace("$", r"\$") for token in tokens]  # text between two dollar signs would be a formula
        axes.set_xticks(range(len(tokens)), labels, family="monospace", fontsize="small")
    save(page, path)


def plot_module_use(use: dict[str, dict[str, Any]], information: dict[str, Any], path) -> None:
    """Plot how much the text of each source uses each module. A module is an expert of one layer.

    There is a row of panels for each kind of module ("ffn" or "attention"), and a column of panels for each source of
    text. A panel is an image with a row per layer and a column per module.

    `use` is {source: {kind: [L,C]}}: for each of L layers, the fraction of the (token, choice) pairs that were routed
      to each of the C modules of the layer.
    `information` is {kind: [L]}: the mutual information between module and source in each layer, in bits.

    In each layer, the modules are sorted by their use by the first source minus their use by the last source, in
    descending order. If there is one source, they are sorted by their use. The order is the same in all panels of a
    row. The modules in a column of an image are not related, because each layer is sorted alone.
    """
    from matplotlib.figure import Figure

    sources, kinds = list(use), list(information)
    L = len(information[kinds[0]])
    page = Figure(figsize=(2 + 3.2 * len(sources), len(kinds) * (1.2 + 0.3 * L)), dpi=150, layout="constrained")
    panels = page.subplots(len(kinds), len(sources), squeeze=False)
    highest = max(np.max(of[kind]) for of in use.values() for kind in kinds)
    for row, kind in zip(panels, kinds, strict=True):
        first, last = (np.asarray(use[source][kind]) for source in (sources[0], sources[-1]))
        order = np.argsort(last - first if len(sources) > 1 else -first, axis=1, kind="stable")
        for axes, source in zip(row, sources, strict=True):
            heat = np.take_along_axis(np.asarray(use[source][kind]), order, 1)
            image = axes.imshow(heat, vmin=0, vmax=highest, cmap="viridis", aspect="auto", interpolation="nearest")
            axes.set(title=f"{kind}: {source}", xlabel="modules, sorted in each layer", xticks=[])
            axes.set_yticks(range(L), range(1, L + 1))
        row[0].set_ylabel("layer")
        if len(sources) > 1:
            right = row[-1].secondary_yaxis("right")
            right.set_yticks(range(L), [f"{bits:.2f}" for bits in information[kind]])
            right.set_ylabel("bits about\nthe source")
            right.tick_params(length=0)
    page.colorbar(image, ax=panels, label="share of the layer's routed pairs", shrink=0.8)
    save(page, path)


def plot_schedule(schedules: dict[str, Callable], path, *, tokens_per_step, total_tokens, log=False) -> None:
    """Plot learning rates against the number of training tokens, with a line per schedule.

    `schedules` is {name: a function that returns the learning rate of a step}. A step has `tokens_per_step` tokens, and
    the plot ends at `total_tokens`. With `log`, both axes are logarithmic, so that a power law is a straight line.
    """
    tokens = np.geomspace(tokens_per_step, total_tokens, 1000) if log else np.linspace(0, total_tokens, 1000)
    page, (axes,) = figure("tokens", "learning rate", **(dict(xscale="log", yscale="log") if log else {}))
    for name, schedule in schedules.items():
        rate = np.asarray(schedule(tokens / tokens_per_step))
        axes.plot(tokens, np.where(rate > 0, rate, np.nan) if log else rate, label=name)
    page.legend(loc="outside right upper")
    save(page, path)


def plot_learning_rate_sweep(records: Records, path) -> None:
    """Plot loss against learning rate, with a line per width and a star at the minimum of each line.

    Runs with muP and runs without muP have separate panels. `records` are the result of
    `stickjax.sweeps.learning_rate_sweep`, with the keys "mup", "width", "learning_rate" and "loss".
    """
    runs = group(records, "mup")
    titles = ["muP" if mup else "without muP" for mup in runs]
    page, panels = figure("learning rate", "loss", titles, xscale=("log", dict(base=2)))
    widths = sorted({r["width"] for r in records})
    for axes, run in zip(panels, runs.values(), strict=True):
        for i, width in enumerate(widths):
            line = sorted((r for r in run if r["width"] == width), key=lambda r: r["learning_rate"])
            color = f"C{i}"
            loss = [r["loss"] if math.isfinite(r["loss"]) else math.nan for r in line]
            axes.plot([r["learning_rate"] for r in line], loss, ".-", color=color, label=f"width {width}")
            for best in best_runs(line, "width"):
                axes.plot(best["learning_rate"], best["loss"], "*", color=color, markersize=13, markeredgecolor="k")
        axes.legend(title="star: minimum")
    save(page, path)


def plot_power_law(best: Records, a: float, b: float, path) -> None:
    """Plot the best learning rate per unit of batch size against the training length, and the fitted power law.

    The law is gamma = a T^b. Here gamma is the best learning rate divided by the batch size beta, and T is the training
    length in tokens. beta is in sequences of 4096 tokens.

    `best` has the record of the best run for every pair of T ("tokens") and beta ("batch_size"), as in
    `stickjax.sweeps.PowerLaw`. `a` and `b` are the constants of the fitted law.
    """
    page, (axes,) = figure("tokens T", r"$\gamma = \eta^*/\beta$ (per sequence)", xscale="log", yscale="log")
    for beta, line in sorted(group(best, "batch_size").items()):
        gamma = [r["learning_rate"] / beta for r in line]
        axes.plot([r["tokens"] for r in line], gamma, "o", label=rf"$\beta$ = {beta:g} sequences")
    ends = np.array([min(r["tokens"] for r in best), max(r["tokens"] for r in best)], float)
    axes.plot(ends, a * ends**b, "k--", label=rf"{a:.3g} $T^{{{b:.3g}}}$")
    ticks(axes, {r["tokens"] for r in best})
    axes.legend()
    save(page, path)
