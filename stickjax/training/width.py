"""Make models of any width, with and without muP, and run the short trainings that `stickjax.sweeps` compares.

Under muP (Yang et al., `Tensor Programs V <https://arxiv.org/abs/2203.03466>`_) the best learning rate is the same at
every width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import jax
import numpy as np

from stickjax.config import Config
from stickjax.data.batches import train_loader
from stickjax.data.corpus import load_corpora
from stickjax.evaluation.plots import Records
from stickjax.models.attention import Context, segment_positions
from stickjax.models.families import family_of
from stickjax.models.layers import cast
from stickjax.models.transformer import Block, Transformer, apply
from stickjax.models.vocabulary_size import with_vocabulary
from stickjax.system.memory import check_fits, state_parts
from stickjax.training.optimizer import label_tree, make_optimizer
from stickjax.training.schedules import SEQUENCE
from stickjax.training.step import TrainState, init_state, make_step

# A small config: a whole sweep takes a few minutes on two CPU cores. m_width is 1 at D = 64.
SMALL = Config().replace(
    {
        "model.D": 64, "model.L": 2, "model.N": 4, "model.K": 4, "model.H": 16, "model.F": 128, "model.m_emb": 12.0,
        "model.m_res": 0.5, "data.T": 64, "data.B": 8, "train.steps": 60, "optim.peak_lr": 0.002,
    }
)  # fmt: skip


def at_width(config: Config, width: int, *, mup: bool, base: float | None = None) -> Config:
    r"""Return the config of an experiment for a model of width D = width, with muP or without.

    The numbers of heads N and K, and the hidden width F, grow in proportion to D. The size H of a head stays the same,
    and so does the scale of the attention logits. m_width, the width multiplier of muP, becomes

    .. math::
        m_{width} = width / base \text{ with muP}, \qquad m_{width} = 1 \text{ without}

    The learning rate in the config stays the same. `logits_scaling`, the divisor of the output logits, keeps its ratio
    to m_width. So the two models of a width, with and without muP, differ only in muP. At width = base they are equal.

    Args:
      config: the experiment at some width.
      width: the new D.
      mup: True: m_width is width / base. False: m_width is 1.
      base: the width at which m_width is 1. None: D / m_width, where D and m_width are fields of `config`. So with
        muP and width = D, the config stays the same.

    Raises:
      ValueError: N, K or F would not be a whole number, or the model family has no m_width.

    >>> model = at_width(SMALL, 256, mup=True).model
    >>> model.D, model.N, model.K, model.H, model.F, model.m_width
    (256, 16, 16, 16, 512, 4.0)
    """
    m = config.model
    if "m_width" not in {f.name for f in dataclasses.fields(m)}:
        raise ValueError(
            f"a model of family={m.family!r} has no m_width, the width multiplier of muP; use family='decoder'"
        )
    if width < 1 or any(getattr(m, name) * width % m.D for name in ("N", "K", "F")):
        raise ValueError(
            f"width={width}: N={m.N}, K={m.K} and F={m.F} are multiplied by width / D = {width}/{m.D}, and the results "
            "must be positive whole numbers; choose another width"
        )
    scaled = {f"model.{name}": getattr(m, name) * width // m.D for name in ("D", "N", "K", "F")}
    m_width = width / (m.D / m.m_width if base is None else base) if mup else 1.0
    logits = None if m.logits_scaling is None else m.logits_scaling * m_width / m.m_width
    return config.replace(scaled | {"model.m_width": m_width, "model.logits_scaling": logits})


def activations(model: Transformer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Run a model on a batch, and return its activations by name: {name: array}.

    The names are "embedding", "logits", and three names for every layer i: "attention i" and "ffn i" are the outputs of
    the two branches of the layer, and "residual i" is the residual stream after the layer. `batch` has `tokens` [B,T]
    and `segment_ids` [B,T].
    """
    c, segment_ids = model.config, batch["segment_ids"]
    context = Context(segment_ids, segment_ids, segment_positions(segment_ids), 0)
    x = c.m_emb * cast(model.embed, c)[batch["tokens"]]
    seen = {"embedding": x}

    def watch(name, part):
        def call(*args):
            result = part(*args)
            seen[name] = result[0] if isinstance(result, tuple) else result
            return result

        return call

    for i in range(c.L):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        watched = {name: watch(f"{name} {i}", getattr(block, name)) for name in ("attention", "ffn")}
        # Run the code of `Block`, but replace attention and ffn by functions that record their results.
        x, _, _ = Block.__call__(SimpleNamespace(**vars(block) | watched), x, context, None, None, None)
        seen[f"residual {i}"] = x
    return seen | {"logits": apply(model, batch).logits}


def transformer(config: Config, width: int, mup: bool) -> tuple:
    """Return (params, optimizer, forward) of a new model of width D = width, for `stickjax.sweeps.coordinate_check`.

    `forward(params)` returns (training loss, activations) for the first batch of the config's text. `mup` says whether
    the model uses muP. The learning rate is always `peak_lr`, because with a warmup it would be too small in the
    few steps of the check.
    """
    constant = {"optim.schedule": "constant", "optim.warmup_tokens": 0, "optim.decay_tokens": 0}
    config = at_width(config, width, mup=mup).replace(constant)
    (batch,) = _batches(config.replace({"train.steps": 1}))
    state = _start(config)

    def forward(params):
        return family_of(config.model).loss(params, batch, state.key)[0], activations(params, batch)

    return state.params, make_optimizer(config, state.params), forward


@functools.lru_cache(maxsize=1)
def training(config: Config) -> Callable[[float], np.ndarray]:
    """Return a function `run(learning_rate)` that trains a new model and returns the training loss of every step.

    Every call starts from the same parameters and trains on the same batches. The learning rate is constant after the
    config's warmup; the config's schedule and peak_lr are not used. No file is written.
    """
    changes = {"optim.schedule": "constant", "optim.peak_lr": 1.0, "optim.decay_tokens": 0}
    # Parameters are float32. In a 16-bit type, an update for learning rate 1 would be rounded, and only then be scaled.
    config = config.replace(changes | {"model.param_dtype": "float32"})
    batches = _batches(config)
    start = _start(config)
    one = make_step(config)

    @jax.jit
    def step(state, batch, rate):
        # An update is proportional to the learning rate. So the step is compiled once, for the learning rate 1, and its
        # update is multiplied by `rate`. The update of a router's bias does not depend on the learning rate.
        new, metrics = one(state, batch)
        move = lambda label, old, new: new if label == "frozen" else old + rate.astype(old.dtype) * (new - old)  # noqa: E731
        params = jax.tree.map(move, label_tree(state.params), state.params, new.params)
        return new._replace(params=params), metrics["loss"]

    def run(learning_rate: float) -> np.ndarray:
        state, losses = start, []
        for batch in batches:
            state, loss = step(state, batch, np.float32(learning_rate))
            losses.append(loss)
        return np.array(jax.device_get(losses))

    return run


def last_loss(losses: np.ndarray) -> float:
    """Return the mean of the last quarter of `losses`, the training losses of all steps.

    In the first epoch, every batch is text that is new to the model. So runs of at most one epoch can be compared by
    this mean, without held-out text.
    """
    return float(losses[-max(1, len(losses) // 4) :].mean())


def final_loss(config: Config, width: int, learning_rate: float, mup: bool) -> float:
    """Train a model of width D = width, and return the mean training loss of the last quarter of its steps.

    The learning rate is constant after the warmup. `mup` says whether the model uses muP. If the training diverges, the
    result may be NaN or infinite.
    """
    return last_loss(training(at_width(config, width, mup=mup))(learning_rate))


def power_law_records(
    config: Config, learning_rates: Iterable[float], *, tokens: Iterable[int], batch_sizes: Iterable[int] | None = None
) -> Records:
    """Return the losses of training runs of several lengths at constant learning rates, for `sweeps.fit_power_law`.

    At a constant learning rate, a long run contains all shorter runs. So only the longest run is trained for every
    learning rate and batch size.

    Args:
      config: the experiment; its number of steps and its schedule are not used.
      learning_rates: the learning rates, constant after the config's warmup.
      tokens: the lengths of training, in tokens.
      batch_sizes: the values of B, the number of sequences in a batch; None: only the config's B.

    Returns:
      A record for every length, batch size and learning rate. It has "tokens", "batch_size" (in sequences of 4096
      tokens), "learning_rate" and "loss" (the mean of the last quarter of the steps).

    Raises:
      ValueError: a length in `tokens` is shorter than one step.
    """
    tokens, learning_rates, records = sorted(tokens), list(learning_rates), []
    for B in batch_sizes or [config.data.B]:
        per_step = B * config.data.T
        if tokens[0] < per_step:
            raise ValueError(f"tokens={tokens[0]} is less than one step of B={B} x T={config.data.T} tokens")
        run = training(config.replace({"data.B": B, "train.steps": tokens[-1] // per_step, "optim.decay_tokens": 0}))
        for rate in learning_rates:
            losses, beta = run(rate), per_step / SEQUENCE
            records += [
                dict(tokens=n, batch_size=beta, learning_rate=rate, loss=last_loss(losses[: n // per_step]))
                for n in tokens
            ]
    return records


def _start(config: Config) -> TrainState:
    """Return the training state before the first step, with random parameters.

    The random keys use the generator "rbg", which compiles in a third of the time of JAX's default generator.
    """
    start = lambda: init_state(config, jax.random.key(config.train.seed, impl="rbg"))  # noqa: E731
    check_fits(state_parts(jax.eval_shape(start)))
    return jax.jit(start)()


def _batches(config: Config) -> list[dict[str, np.ndarray]]:
    """Return the training batches of all steps of a config as a list, so that every run trains on the same batches.

    Raise ValueError if `model.V` is smaller than the vocabulary of the text's tokenizer.
    """
    corpora = _corpora(config.data)
    with_vocabulary(config, {"V": corpora[0].tokenizer.vocab_size})  # checks `model.V`
    return list(itertools.islice(train_loader(corpora, config.data), config.train.steps))


@functools.lru_cache(maxsize=1)
def _corpora(data):
    return load_corpora(data)[0]
