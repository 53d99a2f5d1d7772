"""AdamW under muP, with a learning rate that depends on the tokens trained so far, and with float32 masters.

If a parameter is stored in a smaller type than float32, the optimizer state has a float32 copy of it: its master. An
update is added to the master, and then the parameter is set to the rounded master.
"""

import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stickjax.config import Config
from stickjax.config.fields import nearest
from stickjax.models.parameters import Leaf, label, map_leaves
from stickjax.training.schedules import Transform, make_token_schedule, scale_by_tokens


def is_trainable(name: str, trainable: str) -> bool:
    """Return whether the parameter `name` is trainable. `trainable` is a value of the config field `optim.trainable`.

    `trainable` is a text with patterns that are separated by commas, such as `*,!embed`. A pattern with a "!" freezes
    the parameters whose names match the text after the "!". Any other parameter is trainable if its name matches a
    pattern without a "!", or if all patterns have a "!".

    >>> [is_trainable("blocks.ffn.router.weight", patterns) for patterns in ("*.router.*", "!*.router.*", "*,!embed")]
    [True, False, True]
    """
    patterns = trainable.split(",")
    frozen = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    matches = lambda some: any(fnmatch.fnmatchcase(name, pattern) for pattern in some)  # noqa: E731
    return matches(wanted) and not matches(frozen)


def label_tree(params, trainable: str = "*"):
    """Return a tree like `params` with the label of every parameter: "matrix", "embedding", "vector" or "frozen".

    The optimizer chooses the learning rate and the weight decay of a parameter by its label. `trainable` is a value of
    the config field `optim.trainable` (see `is_trainable`). Names of parameters look like blocks.ffn.router.weight.
    Raise ValueError if a pattern in `trainable` matches no name.
    """
    patterns, names = [pattern.removeprefix("!") for pattern in trainable.split(",")], []

    def of_leaf(leaf: Leaf) -> str:
        names.append(leaf.name)
        return label(leaf) if is_trainable(leaf.name, trainable) else "frozen"

    labels = map_leaves(of_leaf, params)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"optim.trainable: no parameter matches {pattern!r}{nearest(pattern, names)}")
    return labels


def stop_frozen_gradients(config: Config, params):
    """Apply `stop_gradient` to every frozen parameter in `params`, so that its gradient is zero."""
    freeze = lambda label, x: jax.lax.stop_gradient(x) if label == "frozen" else x  # noqa: E731
    return jax.tree.map(freeze, label_tree(params, config.optim.trainable), params)


def make_optimizer(config: Config, params) -> Transform:
    """Return AdamW under muP, with the learning rate eta / m_width for matrices and eta for all other parameters.

    eta is the learning rate of the schedule, and m_width is the width multiplier of muP, `config.model.m_width`. The
    optimizer is a chain: gradient clipping, Adam, decoupled weight decay (not of norms and biases), multiplication by
    -eta, and finally multiplication by 1 / m_width for matrices. So the weight decay of matrices is divided by m_width,
    too, as in the published models. If `optim.scale_decay` is True (strict muP), this weight decay is first multiplied
    by m_width, so that the two factors cancel. All computations are in float32. A trainable parameter of a smaller type
    has a float32 master in the optimizer state, so that small updates are not lost. `optax.apply_updates` sets the
    parameter to the rounded master.

    Args:
      config: the experiment. A step has B * T tokens, unless you call `update` with `tokens=` (see `scale_by_tokens`).
      params: the parameters, or their ShapeDtypeStructs; their values are not used.

    Returns:
      The optimizer. `optax.tree.get(state, name)` returns a value of its state for logs: "learning_rate", "tokens" or,
      if there are masters, "masters". "tokens" is the number of tokens trained so far, as a `TokenCount`; `int()` makes
      it an integer. `init` also accepts parameters in a larger type than `params`; then the masters keep the values of
      these parameters without rounding.

    Raises:
      ValueError: a parameter is not in the table of `models.parameters`, a pattern of `optim.trainable` matches no
        parameter, or all parameters are frozen.
    """
    o, m_width = config.optim, config.model.m_width
    labels = label_tree(params, o.trainable)
    rate = dict(matrix=1 / m_width, embedding=1.0, vector=1.0, frozen=0.0)
    decay = dict(matrix=m_width if o.scale_decay else 1.0, embedding=1.0, vector=0.0, frozen=0.0)
    moving = jax.tree.map(lambda label: label != "frozen", labels)  # a frozen parameter has no moments
    if not any(jax.tree.leaves(moving)):
        raise ValueError(f"optim.trainable={o.trainable!r} freezes every parameter: nothing would be trained")

    def by_label(function) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, params: jax.tree.map(function, labels, updates, params))

    chain = optax.chain(
        optax.identity() if o.clip is None else optax.clip_by_global_norm(o.clip),
        optax.masked(optax.scale_by_adam(o.beta1, o.beta2, o.eps), moving),
        by_label(lambda label, update, param: update + o.weight_decay * decay[label] * param),
        scale_by_tokens(make_token_schedule(config), config.data.tokens_per_step),
        by_label(lambda label, update, param: update * rate[label]),
    )
    small = lambda moves, param: moves and jnp.result_type(param).itemsize < 4  # noqa: E731
    return _in_float32(chain, jax.tree.map(small, moving, params))


class Masters(NamedTuple):
    """The float32 masters (copies) of parameters of a smaller type. They are the last item of the optimizer state."""

    masters: Any  # a tree like the parameters, with a MaskedNode for every parameter that has no master


def _in_float32(tx: Transform, small) -> Transform:
    """Return the optimizer `tx`, changed so that it computes everything in float32.

    `small` is a tree like the parameters, with True for every trainable parameter of a smaller type than float32. Each
    of these parameters has a float32 master. Without masters most updates of a bfloat16 parameter would be lost: they
    are smaller than half the distance to the next bfloat16 number. Adam's moments are float32, too. In bfloat16 they
    would lose small changes, and in float16 they would underflow to zero, so that an update would be 0 / 0.
    """
    cast = lambda tree: optax.tree.cast(tree, jnp.float32)  # noqa: E731
    keep = lambda tree: Masters(jax.tree.map(lambda s, x: x if s else optax.MaskedNode(), small, tree))  # noqa: E731
    if not any(jax.tree.leaves(small)):
        return Transform(
            lambda params: tx.init(cast(params)),
            lambda updates, state, params=None, **extra: tx.update(cast(updates), state, cast(params), **extra),
        )

    def init(params):
        values = cast(params)
        return (*tx.init(values), keep(values))

    def update(updates, state, params, **extra):
        values = jax.tree.map(lambda s, p, master: master if s else p, small, cast(params), state[-1].masters)
        updates, inner = tx.update(cast(updates), state[:-1], values, **extra)
        new = optax.apply_updates(values, updates)
        # Return (rounded master - parameter): adding this update to the parameter gives exactly the rounded master.
        rounded = lambda s, u, new, p: new.astype(p.dtype).astype(u.dtype) - p.astype(u.dtype) if s else u  # noqa: E731
        return jax.tree.map(rounded, small, updates, new, params), (*inner, keep(new))

    return Transform(init, update)
