"""Freeze parameters of a model, and train a model so that it uses few of its modules (experts)."""

from collections.abc import Mapping
from pathlib import Path

import jax

from stickjax.config import Config
from stickjax.models.transformer import Transformer
from stickjax.storage.run_config import read_config
from stickjax.surgery.kinds import kinds_of
from stickjax.training.loop import Result, fit
from stickjax.training.optimizer import label_tree

# Values of `optim.trainable` for an extended model. "frozen": the new modules and their router columns are trainable.
# "full": all routers are trainable, too.
TRAINABLE = {"frozen": "*.new_*", "full": "*.new_*,*.router.*"}


def freeze(config: Config, patterns: str) -> Config:
    """Return a copy of `config` that also freezes the parameters whose names match one of `patterns`.

    `patterns` is a text with patterns that are separated by commas. Each pattern is added to `optim.trainable`, with a
    ! in front.

    >>> freeze(Config(), "*.router.*,embed").optim.trainable
    '*,!*.router.*,!embed'
    """
    return config.replace(
        {"optim.trainable": ",".join([config.optim.trainable, *(f"!{p}" for p in patterns.split(","))])}
    )


def frozen(model: Transformer, trainable: str):
    """Return a mask for optax transforms: a tree like the model, with True for every frozen parameter.

    `trainable` is a value of the config field `optim.trainable`. Raise ValueError if one of its patterns matches no
    parameter.

    >>> import optax
    >>> from stickjax.config import ExpertsConfig, ModelConfig
    >>> from stickjax.models.transformer import init
    >>> model = init(ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16, experts=ExpertsConfig(4, 2)), jax.random.key(0))
    >>> mask = frozen(model, "*,!*.router.*")
    >>> sum(jax.tree.leaves(mask))
    1
    >>> _ = optax.chain(optax.adam(1e-3), optax.masked(optax.set_to_zero(), mask)).init(model)
    """
    return jax.tree.map(lambda label: label == "frozen", label_tree(model, trainable))


def concentrate(
    run: str | Path, out: str | Path, *, weight: float = 0.1, changes: Mapping[str, object] | None = None
) -> Result:
    """Train the model of a run with the load-concentration loss, so that it uses few modules (experts).

    The training starts from the parameters of the run. The losses that distribute tokens evenly over the modules are
    turned off, and the router biases that do the same are frozen. All other parameters are trainable. Afterwards
    `prune` can remove the unused modules.

    Args:
      run: folder of a trained run.
      out: folder of the new run. If `out` already has a checkpoint, the training resumes from it.
      weight: the weight of the load-concentration loss H(e), the entropy of the mean router probabilities over the
        modules (see `models.router.router_stats`).
      changes: changes of the config, as in `Config.replace`: {"data.source": "logic", "train.steps": 200}. They
        override the weights of the losses and the value of `optim.trainable` that this function sets.

    Raises:
      ValueError: the model has no modules, or a change is not valid. `training.loop.fit` raises further errors.
    """
    config = read_config(run)
    kinds_of(config.model)
    still = ["!*.selection_bias"] if any(x.bias_rate for x in config.model.mixtures().values()) else []
    losses = {"mi_weight": 0.0, "switch_weight": 0.0, "concentration_weight": weight}
    settings = {f"model.{field}.{name}": x for field in config.model.mixtures() for name, x in losses.items()} | {
        "optim.trainable": ",".join(["*", *still]),
    }  # fmt: skip
    return fit(config.replace(settings | dict(changes or {})), str(out), init_from=str(run))
