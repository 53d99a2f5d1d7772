"""Small functions of the latent-tree model: affine maps, dropout, and the attention of the nodes to the source."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.arguments import sum_type
from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight

SINK = 1e-3  # the constant 10^-3 in the denominator of the attention weights
LARGEST = 80.0  # exp of a larger number overflows in float32


def affine(x: Float[Array, "*b I"], weight, bias, config) -> Float[Array, "*b O"]:
    """Return x weight + bias, for a weight [I,O] and a bias [O]. Both are converted to the type `config.dtype`."""
    weight, bias = (parameter[...].astype(config.dtype) for parameter in (weight, bias))
    return x @ weight + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def dropped(x, rate: float, random: Array | None):
    """Apply dropout to x: set each value to zero with probability `rate`, and divide the others by 1 - rate.

    `random` has random bytes with the shape of x (`layers.random_bytes`). If `random` is None, x is returned unchanged.
    The rate is rounded to a multiple of 1/256.
    """
    level = round(256 * rate)
    if random is None or not level:
        return x
    return jnp.where(random >= level, x * (256 / (256 - level)), 0).astype(x.dtype)


def split_key(key, count: int) -> list:
    """Split a random key into a list of `count` keys. Without a key, return a list of `count` None values."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class TreeAttention(nnx.Module):
    r"""The attention of the nodes of the tree to the source. It has one head.

    The query of a node with the vector x is q = LN(x @ query + query_bias), and the key of a source vector z is
    k = LN(z @ key + key_bias). With s_m = q . k_m / sqrt(H) over the keys m of the sentence, the weights are

    .. math:: softmax(s)_m \; \sigma(\log \textstyle\sum_m e^{s_m} - 2 \max_m s_m + \log 1000)

    The weights sum to less than 1. The higher the scores, the smaller is the sum. The original code has the same
    formula. Its authors probably intended to add 10^-3 to the denominator of a softmax, but the code subtracts the
    maximum of the scores twice.
    """

    def __init__(self, config, key):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.query, self.query_bias = linear_weight(keys[0], c.H, c.H, c), linear_bias(keys[1], c.H, c.H, c)
        self.key, self.key_bias = linear_weight(keys[2], c.H, c.H, c), linear_bias(keys[3], c.H, c.H, c)
        self.query_norm, self.key_norm = LayerNorm(c), LayerNorm(c)

    def queries(self, x: Float[Array, "B n H"]) -> tuple[Float[Array, "B n H"], Float[Array, "B n 1"]]:
        """Return (y, r) for nodes with the vectors x: r * y is the query q without the LayerNorm's scale and bias."""
        c = self.config
        y = affine(x, centred(cast(self.query, c)), centred(cast(self.query_bias, c)), c)
        return y, inverse_deviation(y, c.norm_eps)

    def keys(self, z: Float[Array, "B M H"], random=None) -> tuple[Float[Array, "B M H"], Float[Array, "B M"]]:
        """Return (k', t) for the source vectors z. With these, the score q . k / sqrt(H) is r (y . k') + t.

        k is the key of a source vector. q = r * y * scale + bias is the query of a node, with (y, r) from `queries`,
        and with the scale and the bias of the queries' LayerNorm. So k' = k * scale / sqrt(H), and
        t = k . bias / sqrt(H). There are usually fewer keys than queries, so it takes fewer operations to multiply the
        keys by the scale. `random`: random bytes [B,M,H] for dropout, or None.
        """
        c, norm = self.config, self.query_norm
        k = self.key_norm(affine(dropped(z, c.attention_dropout, random), self.key, self.key_bias, c)) * c.H**-0.5
        return k * cast(norm.scale, c)[None, None], k @ cast(norm.bias, c)


def centred(weight):
    """Return `weight` minus its mean over the last axis.

    With the result w [I,O], the O values of x @ w have mean 0 for every x. So a LayerNorm after this product need not
    subtract a mean.
    """
    return weight - weight.mean(-1, keepdims=True)


def inverse_deviation(x, eps: float):
    """Return 1 / sqrt(variance + eps) over the last axis, for x with mean 0."""
    return jax.lax.rsqrt(jnp.square(x.astype(sum_type(x))).mean(-1, keepdims=True) + eps).astype(x.dtype)


def attention_weights(scores: Float[Array, "B n M"], mask: Bool[Array, "B M"]) -> Float[Array, "B n M"]:
    """Return the weights of `TreeAttention` from the scores s of n nodes for M keys; 0 where the mask is False.

    >>> weights = attention_weights(jnp.array([[[0.0, 0.0, 9.0]]]), jnp.array([[True, True, False]]))
    >>> [round(weight, 4) for weight in weights[0, 0].tolist()]
    [0.4998, 0.4998, 0.0]
    """
    mask, scores = mask[:, None], scores.astype(sum_type(scores))
    largest = largest_of(jnp.where(mask, scores, -LARGEST))
    largest = jnp.where(mask.any(-1, keepdims=True), largest, 0)  # a sentence without words has no keys
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - largest, 0)), 0)
    return weights / (weights.sum(-1, keepdims=True) + SINK * jnp.exp(jnp.minimum(largest, LARGEST)))


def largest_of(x: Float[Array, "B n M"]) -> Float[Array, "B n 1"]:
    """Return the maximum over the last axis. The whole gradient goes to the first element that has the maximum.

    The derivative of `jnp.max` compares x with its maximum, and divides by the number of equal elements. But XLA may
    compute x twice, for the maximum and for the comparison. If only one of the two uses fused multiply-add
    instructions, they round differently. Then no element is equal, and the gradient is 0, infinite or NaN. This happens
    on CPUs with these instructions, under JAX_DISABLE_MOST_OPTIMIZATIONS. The comparison of indices here is exact.

    >>> jax.grad(lambda x: largest_of(x).sum())(jnp.array([[[1.0, 3.0, 3.0]]])).tolist()
    [[[0.0, 1.0, 0.0]]]
    """
    index = jax.lax.stop_gradient(x).argmax(-1, keepdims=True)
    return jnp.where(jnp.arange(x.shape[-1])[None, None] == index, x, 0).sum(-1, keepdims=True)
