"""Fold the multipliers of muP into the parameters, for a model_type whose config.json has no multipliers.

A decoder computes x = m_emb * embed[token], then x + m_res * branch(norm(x)) for every branch, attention logits
a * q.k with a = `attention_scale`, and output logits norm(x) @ unembed / s with s = `logits_scaling`. The output of the
last normalisation is proportional to its scale, so the scale can be divided by s. The embedding is multiplied by m_emb.
If it is also the output matrix, the scale is divided by m_emb, too. The residual stream x stays the same.
"""

import dataclasses
import math

import numpy as np

from stickjax.config.decoder import ModelConfig
from stickjax.storage.hugging_face.files import Lazy
from stickjax.storage.hugging_face.writers import logits_scaling_of


def folded(c: ModelConfig) -> tuple[ModelConfig, dict[str, float]]:
    """Return (config without multipliers, {name of a parameter: factor}) for a model with the config `c`.

    If the parameters of this model are multiplied by their factors, a model with the returned config and these
    parameters has the same logits. Factors of 1 are left out.

    Raises:
      ValueError: the product of a parameter and its factor could be rounded, because the type of the parameters has 16
        bits. In bfloat16, a factor that is a power of two is allowed, because the product is exact. In float16, even
        such a product may be rounded, because small parameters are subnormal numbers.

    >>> folded(ModelConfig(V=8, m_emb=12.0, m_res=0.25, tied=False))[1]
    {'embed': 12.0, 'blocks/attention/output': 0.25, 'blocks/ffn/w_out': 0.25}
    """
    usual, last = 1 / math.sqrt(c.H), 1 / logits_scaling_of(c)
    query = 1.0 if c.scale == usual else c.scale / usual  # exactly 1 for the usual scale
    queries = ["query", "query_bias"] if c.query_key_norm == "none" else ["query_norm/scale"]
    queries = [name for name in queries if c.query_key_value_bias or name != "query_bias"]
    factors = {"embed": c.m_emb, "norm/scale": last / c.m_emb if c.tied else last}
    factors |= {f"blocks/attention/{name}": query for name in queries}
    factors |= {"blocks/attention/output": c.m_res, "blocks/ffn/w_out": c.m_res}
    factors = {name: factor for name, factor in factors.items() if factor != 1}
    exact = (0.5,) if c.param_dtype == "bfloat16" else ()
    rounded = [name for name, factor in factors.items() if factor and math.frexp(abs(factor))[0] not in exact]
    if c.param_dtype != "float32" and rounded:
        name = rounded[0]
        raise ValueError(
            "its multipliers m_emb, m_res, attention_scale and logits_scaling would be folded into the parameters, but "
            f"{name} times {factors[name]:.6g} cannot always be stored exactly in {c.param_dtype}; instead, load the "
            "model by stickjax.load(RUN, changes={'model.param_dtype': 'float32'}) and write it by stickjax.export"
        )
    return dataclasses.replace(c, m_emb=1.0, m_res=1.0, attention_scale=None, logits_scaling=1.0), factors


def scaled(leaves: dict[str, Lazy], factors: dict[str, float]) -> dict[str, Lazy]:
    """Return the parameters `leaves`, {name: parameter}, times their `factors`, {name: factor}.

    A parameter is multiplied when it is read.
    """

    def product(leaf: Lazy, factor: float) -> Lazy:
        return dataclasses.replace(leaf, read=lambda i: leaf.read(i) * np.asarray(factor, leaf.dtype))

    return {name: product(leaf, factors[name]) if name in factors else leaf for name, leaf in leaves.items()}
