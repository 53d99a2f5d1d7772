"""The two kinds of modules (experts), "attention" and "ffn": where they are in a model and in its config."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stickjax.config import ModelConfig
from stickjax.config.experts import ExpertsConfig
from stickjax.config.family import FamilyConfig
from stickjax.models.parameters import leaves_of, parameter
from stickjax.models.transformer import Transformer, init
from stickjax.storage.checkpoints import named_leaves


class Kind(NamedTuple):
    """A kind of modules (experts). `name` is "attention" or "ffn".

    In a model, the modules are in `blocks.attention` or `blocks.ffn`. `field` is the name of the field of a model
    config that describes them. The value of this field is an `ExpertsConfig`.
    """

    name: str
    field: str

    def mixture(self, config: ModelConfig) -> ExpertsConfig:
        return getattr(config, self.field)

    def chosen(self, config: ModelConfig) -> int:
        """Return the number of modules (experts) of this kind that a token uses in each layer."""
        return config.experts.k if self.name == "ffn" else config.N // config.K

    def changed(self, config: ModelConfig, **fields) -> ModelConfig:
        """Return a copy of the model config `config`, with `fields` changed in the `ExpertsConfig` of this kind."""
        return dataclasses.replace(config, **{self.field: dataclasses.replace(self.mixture(config), **fields)})


KINDS = {"attention": Kind("attention", "attention_experts"), "ffn": Kind("ffn", "experts")}


def kinds_of(config: FamilyConfig) -> list[Kind]:
    """Return the kinds of modules (experts) that a model with this config has.

    Raise ValueError if the model has no modules, or if its family does not support adding and pruning modules.
    """
    if not config.can_change_experts:
        raise ValueError(
            f"modules (experts) cannot be added to a model of family={config.family!r}, nor pruned from it"
        )
    kinds = [kind for kind in KINDS.values() if kind.mixture(config).E]
    if not kinds:
        raise ValueError("the model has no modules (experts): its experts.E and its attention_experts.E are both 0")
    return kinds


def axes_of(model: Transformer, kind: Kind, letter: str) -> dict[str, int]:
    """Return {name of a weight: index of its axis `letter`} for the weights of one kind of experts and their router.

    `letter` is "E" for the axis of the experts, or "C" for the axis of the router columns. Weights without this axis
    are left out. Index 0 is the axis of the layers.
    """
    leaves = leaves_of(getattr(model.blocks, kind.name))
    found = {"/".join(["blocks", kind.name, *leaf.names]): parameter(leaf).axis(letter) for leaf in leaves}
    return {name: axis + 1 for name, axis in found.items() if axis is not None}  # after L


def slots(model: Transformer, kind: Kind) -> np.ndarray:
    """Return which expert each router column belongs to, [L, columns]: its index along the axis E of the weights.

    The index is -1 if the column has no expert, for example because the expert was pruned.
    """
    router = getattr(model.blocks, kind.name).router
    if router.slot is not None:
        return np.asarray(router.slot[...], int)
    return np.tile(np.arange(router.experts.columns), (model.config.L, 1))


def rebuilt(config: ModelConfig, leaves: dict[str, jax.Array], fresh: Transformer | None = None) -> Transformer:
    """Return a model with the config `config` and the arrays `leaves`, {name: array}.

    A name has the form that `named_leaves` uses, such as "blocks/ffn/w_in". An array that is missing in `leaves` is
    taken from the model `fresh`. If `fresh` is None, `leaves` must have all arrays.
    """
    shape = fresh or jax.eval_shape(lambda: init(config, jax.random.key(0)))
    values = []
    for name, leaf in named_leaves(shape).items():
        value = jnp.asarray(leaves.get(name, leaf))
        assert value.shape == leaf.shape, f"{name} is {value.shape}, not {leaf.shape}"
        values.append(value)
    return jax.tree.unflatten(jax.tree.structure(shape), values)
