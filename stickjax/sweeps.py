"""Experiments with many short trainings: coordinate checks of muP, learning-rate sweeps, and the fit of a power law.

The power law of the Power schedule says how the best learning rate depends on the training length and the batch size
(see `fit_power_law`). `coordinate_check` and `learning_rate_sweep` take a function that makes or trains a model. They
return records: dictionaries that can be written as JSON. The plots take records and write a PNG.
`stickjax.training.width` has the functions that make and train the decoder.

python -m stickjax.sweeps coordinate|learning-rate|power-law [--config FILE] [--out DIR] [--section.field=value ...]
"""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from stickjax.config import Config
from stickjax.config.command import Parser, command
from stickjax.config.command_line import load_config, parse
from stickjax.evaluation.plots import (
    Records,
    best_runs,
    figure,
    group,
    plot_learning_rate_sweep,
    plot_power_law,
    save,
    ticks,
)
from stickjax.models.vocabulary_size import with_vocabulary
from stickjax.system.disk import write_file
from stickjax.system.tables import print_table
from stickjax.system.text import json_text
from stickjax.training import width as models
from stickjax.training.schedules import SEQUENCE


def coordinate_check(widths: Iterable[int], make: Callable, *, steps: int = 4, plot=None) -> Records:
    """Measure the mean absolute value of every activation, before the first training step and after each step.

    Models of several widths are compared, to test that they follow muP. Under muP no activation grows or shrinks with
    the width: the slope of log2 mean |activation| against log2 width is between -0.1 and 0.1. Without muP at least one
    slope is above 0.3. The logits may differ from this rule before training: if the output matrix starts with random
    values, they are proportional to width^(-1/2), and reach their final size only during training.

    Args:
      widths: the widths of the models; `slopes` needs at least two widths.
      make: `make(width)` returns (params, optimizer, forward) for a model of this width. `forward(params)` returns
        (loss, {name: activation}) for a fixed batch.
      steps: the number of optimizer steps. All steps use the batch of `forward`.
      plot: the path of a PNG to write, which shows the last step; None: no plot.

    Returns:
      A record {"width", "step", "name", "mean_abs"} for every width, step from 0 to `steps`, and activation.

    References: Yang et al., `Tensor Programs V <https://arxiv.org/abs/2203.03466>`_, 2022, appendix D.1.

    >>> def make(width):
    ...     forward = lambda w: (jnp.sum(w**2), {"hidden": jnp.ones(3) * width})
    ...     return jnp.ones(()), optax.sgd(0.1), forward
    >>> {name: round(slope, 3) for name, slope in slopes(coordinate_check([64, 128], make)).items()}
    {'hidden': 1.0}
    """
    records = []
    for width in widths:
        params, optimizer, forward = make(width)

        def step(params, state, optimizer=optimizer, forward=forward):
            (_, activations), grads = jax.value_and_grad(forward, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            sizes = {name: jnp.abs(x.astype(jnp.float32)).mean() for name, x in activations.items()}
            return optax.apply_updates(params, updates), state, sizes

        step, state = jax.jit(step), optimizer.init(params)
        for i in range(steps + 1):
            params, state, sizes = step(params, state)
            records += [dict(width=width, step=i, name=name, mean_abs=float(x)) for name, x in sizes.items()]
    if plot is not None:
        plot_coordinate_check({"": records}, plot)
    return records


def slopes(records: Records, step: int | None = None) -> dict[str, float]:
    """Return {name of an activation: the slope of log2 mean |activation| against log2 width}.

    Args:
      records: the result of `coordinate_check`.
      step: the optimizer step at which the slopes are taken; None: the last step.

    Raises:
      ValueError: the records have only one width, or an activation is zero or not finite.
    """
    step = max(r["step"] for r in records) if step is None else step
    found = {}
    for name, line in group([r for r in records if r["step"] == step], "name").items():
        width, size = (np.array([r[key] for r in line], float) for key in ("width", "mean_abs"))
        if len(set(width)) < 2:
            raise ValueError(f"a slope needs at least two widths, not {sorted({r['width'] for r in line})}")
        if not (np.isfinite(size) & (size > 0)).all():
            raise ValueError(
                f"activation {name!r} is zero or not finite at step {step}: mean |activation| {size.tolist()}, "
                "one value for each width"
            )
        found[name] = float(np.polyfit(np.log2(width), np.log2(size), 1)[0])
    return found


def learning_rate_sweep(
    widths: Iterable[int], learning_rates: Iterable[float], run: Callable, *, mup=(True, False), plot=None
) -> Records:
    """Run a short training for every width and learning rate, with and without muP, and return the final losses.

    Under muP the best learning rate is the same at every width, and a wider model is better at every learning rate.

    Args:
      widths: the widths of the models.
      learning_rates: the peak learning rates.
      run: the function that trains: `run(width, learning_rate, mup)` returns the final loss, which is not finite if the
        training diverged.
      mup: the parametrisations to run, as a tuple: True is with muP, False is without.
      plot: the path of a PNG to write; None: no plot.

    Returns:
      A record {"width", "learning_rate", "loss", "mup"} for every training.

    >>> run = lambda width, rate, mup: (math.log2(rate * (1 if mup else width)) + 7) ** 2 / width
    >>> records = learning_rate_sweep([16, 32], [2**-12, 2**-11, 2**-7], run)
    >>> [(r["width"], r["mup"], math.log2(r["learning_rate"])) for r in best_runs(records, "width", "mup")]
    [(16, True, -7.0), (16, False, -11.0), (32, True, -7.0), (32, False, -12.0)]
    """
    learning_rates = list(learning_rates)
    records = [
        dict(width=width, learning_rate=rate, loss=float(run(width, rate, m)), mup=m)
        for width in widths
        for m in mup
        for rate in learning_rates
    ]
    if plot is not None:
        plot_learning_rate_sweep(records, plot)
    return records


class PowerLaw(NamedTuple):
    """The result of `fit_power_law`: the law gamma = a T^b.

    T is the training length in tokens. gamma is the best learning rate divided by the batch size beta, which is counted
    in sequences of 4096 tokens.

    `a`, `b`: the constants of the law.
    `best`: for every pair of T and beta, the record of the run with the smallest loss. Its learning rate is replaced by
      the minimum of the parabola that `fit_power_law` describes, if there is such a parabola.
    `residuals`: the error of the law for each record in `best`: ln(measured gamma) - ln(a T^b).
    """

    a: float
    b: float
    best: Records
    residuals: np.ndarray


def _refined(best: dict, line: Records) -> dict:
    """Return a copy of the record `best` with a more precise best learning rate: the minimum of a parabola.

    The runs in `line` differ only in their learning rates, and `best` is the record with the smallest loss. The
    parabola is a function of ln(learning rate). It goes through the losses of three runs: `best`, and the runs with the
    next smaller and the next larger learning rate. If one of the three losses is missing or not finite, or if all three
    are equal, `best` is returned unchanged. The copy keeps the loss of `best`.
    """
    line = sorted(line, key=lambda r: r["learning_rate"])
    at = line.index(best)
    three = line[max(at - 1, 0) : at + 2]
    x, y = (np.array([r[key] for r in three], float) for key in ("learning_rate", "loss"))
    if len(set(x)) < 3 or not np.isfinite(y).all() or y.max() == y.min():
        return best
    curvature, slope, _ = np.polyfit(np.log(x / x[1]), y, 2)
    return best | {"learning_rate": float(x[1] * np.exp(-slope / (2 * curvature)))}


def fit_power_law(records: Records, *, plot=None) -> PowerLaw:
    r"""Fit the law of the Power schedule to the losses of many trainings with constant learning rates.

    .. math::
        \gamma = \eta^* / \beta = a T^b

    eta* is the best learning rate for a training length T in tokens and a batch size beta. It is the minimum of the
    parabola through three runs: the run with the smallest loss, and the runs with the next smaller and the next larger
    learning rate. A least-squares fit of ln(gamma) against ln(T) gives a and b. If one of the two neighbouring runs is
    missing or has no finite loss, or if all three losses are equal, there is no parabola, and eta* is the learning rate
    of the run with the smallest loss. If eta* is the smallest or the largest learning rate of the sweep, repeat the
    sweep with a wider range, because the minimum may be outside.

    Args:
      records: dictionaries with "tokens" (T), "batch_size" (beta, in sequences of 4096 tokens), "learning_rate"
        and "loss"; other keys are ignored.
      plot: the path of a PNG to write; None: no plot.

    Raises:
      ValueError: the records with a finite loss have fewer than two different values of T.

    References: Shen et al., `Power Scheduler <https://arxiv.org/abs/2408.13359>`_, 2024: a = 4.6, b = -0.51.

    >>> rate = lambda tokens: 128 * 4.6 * tokens**-0.51
    >>> sweep = [dict(tokens=t, batch_size=128, learning_rate=rate(t), loss=1.0) for t in (1e9, 1e10, 1e11)]
    >>> law = fit_power_law(sweep)
    >>> f"{law.a:.3f} {law.b:.3f}"
    '4.600 -0.510'
    """
    keys = ("tokens", "batch_size")
    lines = group(records, *keys)
    best = [_refined(r, lines[r["tokens"], r["batch_size"]]) for r in best_runs(records, *keys)]
    tokens = np.array([r["tokens"] for r in best], float)
    gamma = np.array([r["learning_rate"] / r["batch_size"] for r in best], float)
    if len(set(tokens)) < 2:
        raise ValueError(
            f"a power law needs finite losses at two or more training lengths (in tokens), found {len(set(tokens))}"
        )
    b, log_a = np.polyfit(np.log(tokens), np.log(gamma), 1)
    law = PowerLaw(float(np.exp(log_a)), float(b), best, np.log(gamma) - (log_a + b * np.log(tokens)))
    if plot is not None:
        plot_power_law(best, law.a, law.b, plot)
    return law


def plot_coordinate_check(runs: dict[str, Records], path, step: int | None = None) -> None:
    """Plot mean |activation| against width, with a panel per run and the slope of every activation in the legend.

    `runs` is {name of a run: the result of `coordinate_check`}, for example with the names "muP" and "without muP".
    `step` is the optimizer step to plot; None: the last step.
    """
    scales = dict(xscale=("log", dict(base=2)), yscale=("log", dict(base=2)))
    page, panels = figure("width", "mean |activation|", list(runs), **scales)
    for axes, records in zip(panels, runs.values(), strict=True):
        last = max(r["step"] for r in records) if step is None else step
        slope = slopes(records, last)
        for name, line in group([r for r in records if r["step"] == last], "name").items():
            line = sorted(line, key=lambda r: r["width"])
            label = f"{name} ({slope[name]:+.2f})"
            axes.plot([r["width"] for r in line], [r["mean_abs"] for r in line], "o-", label=label)
        ticks(axes, {r["width"] for r in records})
        axes.legend(
            title=f"slope at step {last}", fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2
        )
    save(page, path)


class _Grid(NamedTuple):
    """The values that a sweep tries: widths D, peak learning rates and batch sizes B. A command may ignore some."""

    widths: list[int]
    rates: list[float]
    batch_sizes: list[int]


def _coordinate(config: Config, grid: _Grid, out, status) -> tuple[dict, Table]:
    def make(width, mup):
        status.update(f"width {width}, {_NAMES[mup]}")
        return models.transformer(config, width, mup)

    runs = {
        _NAMES[mup]: coordinate_check(grid.widths, lambda width, mup=mup: make(width, mup)) for mup in (True, False)
    }
    table = Table("activation", *_NAMES.values(), title="slope of log2 mean |activation| against log2 width")
    found = [slopes(records) for records in runs.values()]
    for name in found[0]:
        table.add_row(name, *(f"{slope[name]:+.2f}" for slope in found))
    plot_coordinate_check(runs, out.with_suffix(".png"))
    return {"records": runs}, table


def _learning_rate(config: Config, grid: _Grid, out, status) -> tuple[dict, Table]:
    def run(width, rate, mup):
        status.update(f"width {width}, learning rate {rate:g}, {_NAMES[mup]}")
        return models.final_loss(config, width, rate, mup)

    records = learning_rate_sweep(grid.widths, grid.rates, run, plot=out.with_suffix(".png"))
    best = best_runs(records, "width", "mup")
    table = Table("learning rate", title="loss after the training; * is the smallest of its column")
    columns = group(records, "mup", "width")
    for mup, width in columns:
        table.add_column(f"{width}\n{_NAMES[mup]}", justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(f"{row[0]['learning_rate']:g}", *(f"{r['loss']:.3f}{' *'[r in best]}" for r in row))
    table.caption = _edge(best, grid.rates)
    return {"records": records}, table


def _power_law(config: Config, grid: _Grid, out, status) -> tuple[dict, Table]:
    sizes = ", ".join(map(str, grid.batch_sizes))
    status.update(f"{len(grid.rates)} constant learning rates, each with B={sizes}")
    tokens = [config.total_tokens * m for m in (1, 2, 4, 8)]
    records = models.power_law_records(config, grid.rates, tokens=tokens, batch_sizes=grid.batch_sizes)
    law = fit_power_law(records, plot=out.with_suffix(".png"))
    title = f"gamma = {law.a:.3g} T^{law.b:.3g}"
    table = Table("tokens T", "B", "best learning rate", "loss", "gamma", title=title)
    for r in law.best:
        B, gamma = r["batch_size"] * SEQUENCE / config.data.T, r["learning_rate"] / r["batch_size"]
        table.add_row(f"{r['tokens']:,}", f"{B:g}", f"{r['learning_rate']:.2g}", f"{r['loss']:.3f}", f"{gamma:.3g}")
    table.caption = _edge(law.best, grid.rates)
    return {"records": records, "a": law.a, "b": law.b}, table


_NAMES = {True: "muP", False: "without muP"}
_COMMANDS = {"coordinate": _coordinate, "learning-rate": _learning_rate, "power-law": _power_law}


def _edge(best: Records, rates) -> str | None:
    at_edge = any(r["learning_rate"] in (min(rates), max(rates)) for r in best)
    return "a best learning rate is the smallest or largest of --rates: try a wider range" if at_edge else None


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        whole = "whole " if kind is int else ""
        raise ValueError(f"--{name}={text}: expected positive {whole}numbers separated by commas")
    return values


@command
def main(argv: list[str] | None = None) -> int:
    """Run `python -m stickjax.sweeps` with the arguments `argv`; None: `sys.argv[1:]`. Return the exit code."""
    parser = Parser(prog="python -m stickjax.sweeps")
    parser.add_argument("command", choices=_COMMANDS, help="power-law trains for 1, 2, 4 and 8 times train.steps")
    parser.add_argument("--config", help="name of a config, .py file, or a run's config.json; default: a small model")
    parser.add_argument("--out", default="runs/sweeps", help="folder for COMMAND.json and COMMAND.png")
    parser.add_argument("--widths", help="widths D, such as 64,128,256; default: 1, 2 and 4 times the config's D")
    parser.add_argument("--rates", help="learning rates, such as 1e-3,2e-3; default: peak_lr times 2^-2, 2^-1 ... 2^4")
    parser.add_argument("--batch-sizes", help="values of B for power-law, such as 4,8,16; default: the config's B")
    words, rest = parser.parse_with_fields(argv)
    console = Console(highlight=False)
    config = with_vocabulary(parse(load_config(words.config) if words.config else models.SMALL, rest))
    D, peak = config.model.D, config.optim.peak_lr
    widths = _numbers("widths", words.widths, int) if words.widths else [D, 2 * D, 4 * D]
    rates = _numbers("rates", words.rates, float) if words.rates else [peak * 2.0**e for e in range(-2, 5)]
    batch_sizes = _numbers("batch-sizes", words.batch_sizes, int) if words.batch_sizes else [config.data.B]
    models.at_width(config, D, mup=True)  # raises for a model without muP, before anything is written
    out = Path(words.out) / words.command
    out.parent.mkdir(parents=True, exist_ok=True)
    with console.status(words.command) as status:
        result, table = _COMMANDS[words.command](config, _Grid(widths, rates, batch_sizes), out, status)
    write_file(f"{out}.json", json_text({"config": config.to_dict()} | result, indent=1) + "\n")
    print_table(table)
    print(f"{out}.json, {out}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
