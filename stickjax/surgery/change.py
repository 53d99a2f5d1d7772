"""Make a larger or a smaller model from a trained model. The trained model itself does not change."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from stickjax.config.fields import one_of
from stickjax.models.transformer import Transformer, init
from stickjax.storage.checkpoints import named_leaves
from stickjax.surgery.kinds import KINDS, Kind, axes_of, kinds_of, rebuilt, slots


def extend(model: Transformer, key: jax.Array, *, experts: int = 0, attention_experts: int = 0) -> Transformer:
    """Return a larger model, which has new modules (experts) in every layer.

    A router computes the logits [A; A'] r(x) of a token x. The matrix A gives the logits of the old modules, the matrix
    A' gives the logits of the new modules, and r(x) is the input of both matrices. The new modules and A' are separate
    arrays (`new_*`), so that patterns of `optim.trainable` can select them (see `tune.TRAINABLE`). They have the
    initial values of a new model. Modules from an earlier call of `extend` become old modules first: their arrays are
    appended to the arrays of the old modules (see `merged`).

    The weights of the old modules do not change. If all logits A' r(x) are -inf, the routers return the same bits as
    before, and so does the model with implementation="reference". With implementation="xla" on a CPU, the last bit may
    change, because the number of experts decides how many rows are multiplied at once.

    Args:
      model: a trained model with experts.
      key: random key of the new parameters.
      experts: how many modules to add to each feed-forward network.
      attention_experts: how many modules to add to each attention layer.

    Raises:
      ValueError: nothing is added, a number is negative, or the model has no modules of the kind to add.

    >>> from stickjax.config import ExpertsConfig, ModelConfig
    >>> config = ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16, experts=ExpertsConfig(4, 2, "softmax_topk"))
    >>> extend(init(config, jax.random.key(0)), jax.random.key(1), experts=3).blocks.ffn.new_w_out.shape
    (2, 3, 16, 8)
    """
    added = {"ffn": experts, "attention": attention_experts}
    if min(added.values()) < 0:
        raise ValueError(
            f"the numbers of modules to add, experts={experts} and attention_experts={attention_experts}, "
            "must be 0 or more"
        )
    if not any(added.values()):
        raise ValueError("no modules to add: experts and attention_experts are both 0; give at least one of the two")
    model = merged(model)
    present = {kind.name for kind in kinds_of(model.config)}
    for name, number in added.items():
        if number and name not in present:
            raise ValueError(
                f"cannot add {number} {name} modules to a model without such modules: its {KINDS[name].field}.E is 0"
            )
    config, leaves = model.config, named_leaves(model)
    for name in present:
        config = KINDS[name].changed(config, added=added[name])
    for name in present:
        place, E, new = f"blocks/{name}/router", KINDS[name].mixture(config).E, added[name]
        appended = {"slot": jnp.arange(E, E + new, dtype=jnp.float32), "selection_bias": jnp.zeros(new)}
        for leaf, values in appended.items():
            if (old := leaves.get(f"{place}/{leaf}")) is not None:
                values = jnp.tile(values.astype(old.dtype), (config.L, 1))
                leaves[f"{place}/{leaf}"] = jnp.concatenate([old, values], axis=1)
    return rebuilt(config, leaves, init(config, key))


def merged(model: Transformer) -> Transformer:
    """Return a copy of an extended model in which old and new modules (experts) are in the same arrays.

    `extend` keeps the new modules in separate arrays (`new_*`). This function appends them to the arrays of the old
    modules. The modules stay separate: none of them are combined. The result computes the same outputs, up to rounding
    (see `router.probabilities`). A model without new modules is returned as it is.

    >>> from stickjax.config import ExpertsConfig, ModelConfig
    >>> config = ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16, experts=ExpertsConfig(4, 2, "softmax_topk"))
    >>> merged(extend(init(config, jax.random.key(0)), jax.random.key(1), experts=3)).config.experts.E
    7
    """
    config, leaves = model.config, named_leaves(model)
    extended = [kind for kind in kinds_of(config) if kind.mixture(config).added]
    if not extended:
        return model
    for kind in extended:
        for name, axis in (axes_of(model, kind, "E") | axes_of(model, kind, "C")).items():
            if "/new_" in name:
                old = name.replace("/new_", "/")
                leaves[old] = jnp.concatenate([leaves[old], leaves.pop(name)], axis)
        mixture = kind.mixture(config)
        config = kind.changed(config, E=mixture.E + mixture.added, added=0)
    return rebuilt(config, leaves)


def prune(
    model: Transformer,
    use: Mapping[str, np.ndarray],
    *,
    count: int | Mapping[str, int] | None = None,
    threshold: float | Mapping[str, float] | None = None,
    denominator: str = "old",
) -> Transformer:
    """Return a smaller model, without the least used modules (experts of attention or of feed-forward networks).

    The weights of every layer have room for as many modules as the layer that keeps the most; unused room is zeros. The
    router of a layer has one column for each module. If some columns have no module any more, routers have a parameter
    `slot`. Its entry slot[c] is the index of column c's module in the weights of the layer, or -1 if there is none.

    Args:
      model: a trained model. `merged` first appends modules that `extend` added to the arrays of the old modules.
      use: {kind: [L, columns]}, the result of `usage.use`: the number of (token, choice) pairs of each router column in
        each layer. A kind ("ffn" or "attention") that is missing here, or in `count` or `threshold`, is not pruned.
      count: each layer keeps this number of its most used modules. One number, or {kind: number}.
      threshold: a layer keeps the modules that have at least this share of its (token, choice) pairs. If a token uses k
        modules, each layer keeps at least its k most used modules. One number, or {kind: number}.
      denominator: the columns over which the softmax of a router sums. "old": all columns, also of pruned modules. Then
        the output for a token that uses no pruned module stays the same, except for the last bit (see `extend`). "new":
        only kept modules, so the gates grow. With `order="topk_softmax"`, both give the same gates.

    Raises ValueError if both or none of `count` and `threshold` are given, or a value is out of range; if `use` has an
    array of a wrong shape, or of a kind that the model lacks; or for denominator="old" after a pruning with "new".

    >>> from stickjax.config import ExpertsConfig, ModelConfig
    >>> config = ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16, experts=ExpertsConfig(4, 2, "softmax_topk"))
    >>> model = init(config, jax.random.key(0))
    >>> prune(model, {"ffn": np.array([[9, 0, 5, 1], [2, 2, 3, 1]])}, count=3).blocks.ffn.router.slot[...].tolist()
    [[0.0, -1.0, 1.0, 2.0], [0.0, 1.0, 2.0, -1.0]]
    """
    one_of("denominator", denominator, ("old", "new"))
    if (count is None) == (threshold is None):
        raise ValueError(f"give either count or threshold, got count={count} and threshold={threshold}")
    model = merged(model)
    config, leaves = model.config, named_leaves(model)
    if denominator == "old" and any(x.pruning == "new_denominator" for x in config.mixtures().values()):
        raise ValueError(
            "denominator='old' is not possible after a pruning with denominator='new': the router columns of the "
            "pruned modules are no longer there; use denominator='new'"
        )
    if missing := use.keys() - {kind.name for kind in kinds_of(config)}:
        raise ValueError(
            f"the model has no modules (experts) of the kind {', '.join(sorted(missing))}, but `use` has counts of them"
        )
    sizes = {}
    for kind in kinds_of(config):
        slot = slots(model, kind)
        keep = slot >= 0
        limits = [what.get(kind.name) if isinstance(what, Mapping) else what for what in (count, threshold)]
        if kind.name in use and limits != [None, None]:
            keep = _kept(kind, keep, np.asarray(use[kind.name]), kind.chosen(config), *limits)
        sizes[kind] = _keep(model, leaves, kind, slot, keep, denominator)
    even = all((leaves[f"blocks/{kind.name}/router/slot"] >= 0).all() for kind in kinds_of(config))
    for kind, fields in sizes.items():
        config = kind.changed(config, **fields, pruning="no" if even else f"{denominator}_denominator")
    return rebuilt(config, leaves)


def _kept(kind: Kind, alive, use, k: int, count: int | None, threshold: float | None) -> np.ndarray:
    """Choose the modules (experts) that `prune` keeps. Return a mask [L, columns]: True for their router columns.

    The router of a layer has one column for each module. `alive` [L, columns] is False for a column without a module,
    for example because the module was pruned earlier. `use` [L, columns] has the number of (token, choice) pairs of
    each column. `k` is the number of modules that a token uses.

    If `count` is given, each layer keeps its `count` most used modules. If `threshold` is given, a layer keeps a module
    if it has at least this share of the layer's pairs, or if it is one of the layer's `k` most used modules.
    """
    if use.shape != alive.shape:
        raise ValueError(
            f"use[{kind.name!r}] has shape {list(use.shape)}, but must have {list(alive.shape)}: "
            "[layers, router columns]"
        )
    fewest = int(alive.sum(1).min())
    if count is not None and not k <= count <= fewest:
        raise ValueError(
            f"count={count} must be at least {k}, the number of {kind.name} modules that a token uses, and at most "
            f"{fewest}, the number of {kind.name} modules in the layer that has the fewest"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be a share: a number from 0 to 1")
    # Modules that were pruned earlier come last. Of equally used modules, the module with the lower column comes first.
    order = np.argsort(np.where(alive, -use.astype(float), np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1)
    if count is not None:
        return rank < count
    share = use / np.maximum(use.sum(1, keepdims=True), 1)
    return alive & ((share >= threshold) | (rank < k))


def _keep(model: Transformer, leaves: dict, kind: Kind, slot, keep, denominator: str) -> dict[str, int]:
    """Remove the pruned modules (experts) of one kind from `leaves`, {name: array}. Return the changed config fields.

    The router of a layer has columns, and each column belongs to one module. `slot` [L, columns] has the index of this
    module in the arrays with the weights of the modules, or -1 if the column has no module any more (see `slots`).
    `keep` [L, columns] is True if the module remains. `denominator` says what happens to the columns of the pruned
    modules. With "old", the router keeps them, and its softmax still sums over them. With "new", they are removed.

    The returned fields belong to the kind's `ExpertsConfig`: "E" is the largest number of modules that a layer keeps,
    and "pruned" is the number of columns that the router has after this change, minus E.
    """
    E = int(keep.sum(1).max())
    columns = np.argsort(~keep, axis=1, kind="stable")[:, :E]  # indices of the kept columns, in their order
    kept = np.take_along_axis(keep, columns, 1)
    places = np.where(kept, np.arange(E)[None], -1)
    place = f"blocks/{kind.name}"

    def taken(leaf, indices, axis):
        shape = [1] * leaf.ndim
        shape[0], shape[axis] = indices.shape
        taken = jnp.take_along_axis(leaf, jnp.asarray(indices).reshape(shape), axis)
        return jnp.where(kept.reshape(shape), taken, jnp.zeros((), leaf.dtype))

    for name, axis in axes_of(model, kind, "E").items():
        indices = np.maximum(np.take_along_axis(slot, columns, 1), 0)
        leaves[name] = taken(leaves[name], indices, axis)
    if denominator == "new":
        pruned = 0
        for name, axis in axes_of(model, kind, "C").items():
            leaves[name] = taken(leaves[name], columns, axis)
    else:
        pruned = keep.shape[1] - E
        places = np.full(keep.shape, -1)
        np.put_along_axis(places, columns, np.where(kept, np.arange(E)[None], -1), 1)
    leaves[f"{place}/router/slot"] = jnp.asarray(places, jnp.float32)
    return {"E": E, "pruned": pruned}
