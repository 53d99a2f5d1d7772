"""AdamW under muP, its learning rate by tokens, and float32 masters of parameters that are stored in a smaller type.

A parameter that is stored in a smaller type than float32 has a float32 copy in the optimizer state, its master. The
updates are added to the master, and the parameter is set to the rounded master.
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
    """Return whether the parameter `name` is trainable under a value `trainable` of the field `optim.trainable`.

    It is trainable if its name matches a pattern without a !, and no pattern after a !. If all patterns have a !, the
    first condition holds for every name.

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

    `trainable` is a value of the config field `optim.trainable`: patterns of the names of trainable parameters, such as
    blocks.ffn.router.weight, separated by commas. A pattern after a ! names frozen parameters. If all patterns have
    a !, all other parameters are trainable. Raises ValueError for a pattern that matches no name.
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
    """Return the parameters, with a stopped gradient for every parameter that `optim.trainable` freezes."""
    freeze = lambda label, x: jax.lax.stop_gradient(x) if label == "frozen" else x  # noqa: E731
    return jax.tree.map(freeze, label_tree(params, config.optim.trainable), params)


def make_optimizer(config: Config, params) -> Transform:
    """Return AdamW under muP, with the learning rate eta / m_width for matrices and eta for all other parameters.

    The optimizer is a chain: clipping, one Adam, decoupled weight decay (not of norms and biases), the learning rate by
    tokens, and the factor 1 / m_width of the matrices. This factor comes last. So it also divides the weight decay of
    the matrices, as in the published models; `scale_decay` multiplies this weight decay by m_width again (strict muP).
    All values are float32. A trainable parameter of a smaller type has a float32 master in the state, which keeps
    small updates; `optax.apply_updates` sets the parameter to the rounded master.

    Args:
      config: the experiment. Its tokens_per_step is used for updates without `tokens=`, see `scale_by_tokens`.
      params: the parameters, or their shapes; their names and types are read.
    Returns:
      The optimizer. For logs, `optax.tree.get(state, name)` has "learning_rate", "tokens" (`int()` converts it) and, if
      there are masters, "masters". `init` also takes values in a larger type than `params`; the masters keep them.
    Raises:
      ValueError: a parameter has no label, a pattern of `optim.trainable` matches nothing, or all are frozen.
    """
    o, m_width = config.optim, config.model.m_width
    labels = label_tree(params, o.trainable)
    rate = dict(matrix=1 / m_width, embedding=1.0, vector=1.0, frozen=0.0)
    decay = dict(matrix=m_width if o.scale_decay else 1.0, embedding=1.0, vector=0.0, frozen=0.0)
    moving = jax.tree.map(lambda label: label != "frozen", labels)  # a frozen parameter has no moments either
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
    """The float32 masters of parameters, as the last part of the state of an optimizer."""

    masters: Any  # a tree like the parameters, with MaskedNode for a parameter without a master


def _in_float32(tx: Transform, small) -> Transform:
    """Return the optimizer `tx`, changed so that it computes everything in float32.

    `small` is a tree like the parameters, with True for every trainable parameter of a smaller type than float32. These
    parameters get a master. Without masters most updates of a bfloat16 parameter are lost, because they are below half
    a unit of its last place. Moments in bfloat16 would lose small changes, and moments in float16 would underflow to
    0 / 0.
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
        # The difference between the parameter and its rounded master: the sum of both is the rounded master, exactly.
        rounded = lambda s, u, new, p: new.astype(p.dtype).astype(u.dtype) - p.astype(u.dtype) if s else u  # noqa: E731
        return jax.tree.map(rounded, small, updates, new, params), (*inner, keep(new))

    return Transform(init, update)
