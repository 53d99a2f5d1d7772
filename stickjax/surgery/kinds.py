"""The two kinds of modules: where a block has them, and what the config calls them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stickjax.config import ModelConfig, SutConfig
from stickjax.models.transformer import Transformer, init
from stickjax.storage.checkpoints import named_leaves


class Kind(NamedTuple):
    """`old`, `new`, `gone`: fields of the config; `weights`: leaves of `blocks.<name>` with an axis E behind L."""

    name: str
    old: str
    new: str
    gone: str
    weights: tuple[str, str]

    def chosen(self, config: ModelConfig) -> int:
        """How many modules a token goes to."""
        return config.k if self.name == "ffn" else config.N // config.K


KINDS = {
    "attention": Kind(
        "attention", "attention_experts", "new_attention_experts", "gone_attention_experts",
        ("expert_query", "expert_output"),
    ),
    "ffn": Kind("ffn", "E", "new_experts", "gone_experts", ("w_in", "w_out")),
}  # fmt: skip


def kinds_of(config: ModelConfig | SutConfig) -> list[Kind]:
    """The kinds that a model has; ValueError for a dense one, and for one that is no decoder."""
    if not isinstance(config, ModelConfig):
        raise ValueError(f"only a decoder has modules, not a model of family={config.family!r}")
    kinds = [kind for kind in KINDS.values() if getattr(config, kind.old)]
    if not kinds:
        raise ValueError("the model has no modules: E=0 and attention_experts=0")
    return kinds


def slots(model: Transformer, kind: Kind) -> np.ndarray:
    """[L, columns]: where the module of every column of the router stands among the weights, -1 if it was pruned."""
    router = getattr(model.blocks, kind.name).router
    if router.slot is not None:
        return np.asarray(router.slot[...], int)
    return np.tile(np.arange(router.experts.columns), (model.config.L, 1))


def rebuilt(config: ModelConfig, leaves: dict[str, jax.Array], fresh: Transformer | None = None) -> Transformer:
    """The model of `config` with `leaves` by name; one that is not among them is that of `fresh`."""
    shape = fresh or jax.eval_shape(lambda: init(config, jax.random.key(0)))
    values = []
    for name, leaf in named_leaves(shape).items():
        value = jnp.asarray(leaves.get(name, leaf))
        assert value.shape == leaf.shape, f"{name} is {value.shape}, not {leaf.shape}"
        values.append(value)
    return jax.tree.unflatten(jax.tree.structure(shape), values)
