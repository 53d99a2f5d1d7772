"""The families of models, by their config: a decoder, a Sparse Universal Transformer."""

from stickjax.config import ModelConfig, SutConfig
from stickjax.models import sut, transformer

FAMILIES = {"decoder": transformer, "sut": sut}


def init(config: ModelConfig | SutConfig, key):
    """Parameters of a model, as a pytree that is also the model."""
    return FAMILIES[config.family].init(config, key)


def apply(params, batch: dict, key=None):
    """Run a model on a batch; its output has `logits`."""
    return FAMILIES[params.config.family].apply(params, batch, key)


def empty_cache(config: ModelConfig | SutConfig, batch: int, size: int):
    """For `decode_step`: what a language model keeps of up to `size` tokens of `batch` sequences."""
    return FAMILIES[config.family].empty_cache(config, batch, size)


def decode_step(model, tokens, segment_ids, cache):
    """(logits [B,V] after the last of `tokens` [B,T], the cache with them); a negative segment id is padding."""
    return FAMILIES[model.config.family].decode_step(model, tokens, segment_ids, cache)


def parameter_counts(config: ModelConfig | SutConfig) -> tuple[int, int]:
    """All parameters, and those that work on one token (in every step, where a block is applied several times).

    >>> parameter_counts(ModelConfig.powermoe_3b())[0], parameter_counts(SutConfig(D=8, H=4, F=16))
    (3298788864, (6856, 2352))
    """
    return FAMILIES[config.family].parameter_counts(config)
