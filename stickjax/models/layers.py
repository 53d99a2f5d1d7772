"""Small parts of models: initialisers, dropout, normalisations, rotary positions, the dense feed-forward network."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.arguments import sum_type
from pallas_kernels.scatter_moe.call import ACTIVATIONS, GATED
from stickjax.config import ModelConfig
from stickjax.config.rope import RopeScaling
from stickjax.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel


def normal(key, shape, std: float, config: ModelConfig) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(key, shape, config.param_dtype))


def uniform(key, shape, limit: float, config) -> nnx.Param:
    """Return a new parameter, drawn uniformly between -limit and limit, in the type `config.param_dtype`."""
    return nnx.Param(jax.random.uniform(key, shape, config.param_dtype, -limit, limit))


def linear_weight(key, inputs: int, outputs: int, config) -> nnx.Param:
    """Return a new matrix [inputs,outputs], drawn uniformly between -1/sqrt(inputs) and 1/sqrt(inputs)."""
    return uniform(key, (inputs, outputs), inputs**-0.5, config)


def linear_bias(key, inputs: int, outputs: int, config) -> nnx.Param:
    """Return a new bias [outputs] for a matrix of `linear_weight`, drawn from the same distribution as the matrix."""
    return uniform(key, (outputs,), inputs**-0.5, config)


def dropout(x, rate: float, key):
    """Set each value of x to zero with probability `rate`, and divide the other values by 1 - rate.

    `key` is a random key. Without a key, x is returned unchanged.
    """
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def random_bytes(key, *shape: int) -> UInt8[Array, "..."] | None:
    """Return an array of this shape with random numbers of 8 bits, for dropout masks. Without a key, return None.

    The numbers are made from random numbers of 32 bits. On a CPU, this takes a fifth of the time of `jax.random.bits`
    with numbers of 8 bits.

    >>> random_bytes(jax.random.key(0), 2, 3).shape
    (2, 3)
    """
    if key is None:
        return None
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 4),), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:count].reshape(shape)


def matrix_std(config: ModelConfig) -> float:
    """Return the initial standard deviation of an internal matrix under muP: init_std / sqrt(m_width).

    Internal matrices are all matrices except the embedding and the output matrix. `init_std` and `m_width`, the width
    multiplier of muP, are fields of the config.
    """
    return config.init_std / config.m_width**0.5


def output_std(config: ModelConfig) -> float:
    """Return the initial standard deviation of the last matrix of a residual branch: `matrix_std(config)` / sqrt(2 L).

    2 L is the number of residual branches: each of the L layers has an attention and a feed-forward network.
    """
    return matrix_std(config) / (2 * config.L) ** 0.5


def cast(param: nnx.Param, config: ModelConfig) -> jax.Array:
    """Return the array of a parameter, converted to the type of the computation, `config.dtype`."""
    return param[...].astype(config.dtype)


def all_experts(module, name: str) -> jax.Array:
    """Return the weights of all experts of a module as one array, in the type of the computation, `config.dtype`.

    `name` is a parameter of the module, such as "w_in". The first axis of this parameter is the axis of the experts. If
    experts were added to a trained model, their weights are the parameter `new_<name>`, and come last in the result.
    Otherwise `new_<name>` is None.
    """
    new, c = getattr(module, f"new_{name}"), module.config
    weights = cast(getattr(module, name), c)
    return weights if new is None else jnp.concatenate([weights, cast(new, c)])


class RMSNorm(nnx.Module):
    """Normalise over the last axis, in fp32: x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, config: ModelConfig, eps: float | None = None):
        self.eps = config.norm_eps if eps is None else eps
        self.scale = nnx.Param(jnp.ones(config.D, config.param_dtype))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalise over the last axis: (x - mean) / sqrt(variance + eps) * scale + bias.

    The type of the computation is fp32, or fp64 if x is fp64.
    """

    def __init__(self, config, eps: float | None = None, size: int | None = None):
        self.eps = config.norm_eps if eps is None else eps
        size = config.D if size is None else size
        self.scale = nnx.Param(jnp.ones(size, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(size, config.param_dtype))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        ones, exact = (1,) * (x.ndim - 1), sum_type(x)
        scale, bias = (p[...].astype(exact).reshape(*ones, -1) for p in (self.scale, self.bias))
        return (normalised(x.astype(exact), self.eps) * scale + bias).astype(x.dtype)


def norm_of(config: ModelConfig, eps: float | None = None) -> RMSNorm | LayerNorm:
    """Return a new normalisation of the residual stream: an RMSNorm if `config.norm` is "rms", else a LayerNorm.

    `eps` is added to the mean square or to the variance; None: `config.norm_eps`.
    """
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config, eps)


def normalised(x, eps: float):
    """Normalise x over its last axis: (x - mean) / sqrt(variance + eps)."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


class HeadNorm(nnx.Module):
    """Normalise the output of every attention head: a GroupNorm with one group per head.

    The H values of a head get mean 0 and variance 1. Then a trainable scale and bias [N,H] are applied. If the values
    of an output are near zero, they are multiplied by up to 1 / sqrt(norm_eps), with `norm_eps` of the config. The
    first token of a sequence can have such an output, because in stick-breaking attention it may have no key to attend
    to.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.scale = nnx.Param(jnp.ones((config.N, config.H), config.param_dtype))
        self.bias = nnx.Param(jnp.zeros((config.N, config.H), config.param_dtype))

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        y = normalised(x.astype(jnp.float32), self.config.norm_eps)
        return (
            y * self.scale[...].astype(jnp.float32)[None, None] + self.bias[...].astype(jnp.float32)[None, None]
        ).astype(x.dtype)


class QueryKeyNorm(nnx.Module):
    """Normalise the queries or the keys x of an attention layer, in fp32: x / sqrt(mean(x^2) + norm_eps) * scale.

    If `config.query_key_norm` is "head", the mean is over the H values of a head, and all heads have the same `scale`
    [H]. If it is "all", the mean is over the values of all heads, and `scale` is [heads, H], where `heads` is N for
    queries and K for keys.
    """

    def __init__(self, config: ModelConfig, heads: int):
        self.config, self.heads = config, heads
        self.scale = nnx.Param(jnp.ones(self.shape(config, heads), config.param_dtype))

    @staticmethod
    def shape(config: ModelConfig, heads: int) -> tuple[int, ...]:
        return (config.H,)

    def __call__(self, x: Float[Array, "B T X H"]) -> Float[Array, "B T X H"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(self.mean_square(y) + self.config.norm_eps)
        return (y * self.scale_of_heads()).astype(x.dtype)

    def mean_square(self, x: Float[Array, "B T X H"]):
        return jnp.square(x).mean(-1, keepdims=True)

    def scale_of_heads(self):
        # Each device along the mesh axis "tensor" has a part of the heads, and all of them use the same scale.
        return copy_to_tensor_parallel(self.scale[...].astype(jnp.float32))[None, None, None]


class AllQueryNorm(QueryKeyNorm):
    """The `QueryKeyNorm` of the queries for `config.query_key_norm="all"`."""

    @staticmethod
    def shape(config: ModelConfig, heads: int) -> tuple[int, ...]:
        return (heads, config.H)

    def mean_square(self, x: Float[Array, "B T X H"]):
        # The sum is over the heads of all devices. Then each device uses the sum for the heads that it has.
        total = jnp.square(x).sum((-2, -1), keepdims=True)
        return copy_to_tensor_parallel(reduce_from_tensor_parallel(total)) / (self.heads * x.shape[-1])

    def scale_of_heads(self):
        return self.scale[...].astype(jnp.float32)[None, None]


class AllKeyNorm(AllQueryNorm):
    """The `QueryKeyNorm` of the keys for `config.query_key_norm="all"`.

    It is a separate class, because the table of parameters has the axes of `scale` for each class: here "K H".
    """


def query_key_norms(config: ModelConfig) -> tuple[QueryKeyNorm | None, QueryKeyNorm | None]:
    """Return (normalisation of the queries, normalisation of the keys), or (None, None) if query_key_norm is "none"."""
    if config.query_key_norm == "none":
        return None, None
    query, key = (QueryKeyNorm, QueryKeyNorm) if config.query_key_norm == "head" else (AllQueryNorm, AllKeyNorm)
    return query(config, config.N), key(config, config.K)


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float, scaling: RopeScaling | None = None
) -> Float[Array, "B T N H"]:
    """Apply rotary positions (arXiv 2104.09864) to the queries or keys x.

    The channels i and i + H/2 of a head form a pair, for i < H/2. The pair is rotated by the angle
    position * theta^(-2i/H). `scaling` makes the angles smaller, as the docstring of `RopeScaling` says; None:
    no scaling.
    """
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half) / half)
    if scaling is not None and scaling.kind != "none":
        turns, low, high = (
            scaling.original_T * frequency / (2 * math.pi),
            scaling.low_freq_factor,
            scaling.high_freq_factor,
        )
        kept = 0.0 if scaling.kind == "linear" else jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def gates(config: ModelConfig) -> int:
    """Return G, the number of inputs of the activation per hidden unit: 2 with a gate, as in swiglu, else 1."""
    return 2 if config.activation in GATED else 1


class FeedForward(nnx.Module):
    """A dense feed-forward network: act(x w_in) w_out, with w_in [D,G,F] and w_out [F,D].

    F is the number of hidden units, and act is the activation of the config. With a gated activation, G is 2, and
    w_in[:, 0] computes the gate. Else G is 1.
    """

    def __init__(self, config: ModelConfig, key, hidden: int | None = None):
        self.config, F = config, config.F if hidden is None else hidden
        k_in, k_out = jax.random.split(key)
        self.w_in = normal(k_in, (config.D, gates(config), F), matrix_std(config), config)
        self.w_out = normal(k_out, (F, config.D), output_std(config), config)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        w_in, w_out = cast(self.w_in, self.config), cast(self.w_out, self.config)
        hidden = jnp.einsum("BTD,DF->BTF", copy_to_tensor_parallel(x), w_in.reshape(w_in.shape[0], -1))
        return reduce_from_tensor_parallel(
            jnp.einsum("BTF,FD->BTD", ACTIVATIONS[self.config.activation](hidden), w_out)
        )


class SharedExpert(FeedForward):
    """A `FeedForward` with `config.experts.shared` hidden units. Every token uses it in addition to k experts."""

    def __init__(self, config: ModelConfig, key):
        super().__init__(config, key, config.experts.shared)
