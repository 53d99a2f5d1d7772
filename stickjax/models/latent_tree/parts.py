"""Small parts of the model: affine maps, dropout, and the attention that nodes and words share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.arguments import sum_type
from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight

SINK = 1e-3  # the constant in the denominator of the attention weights
LARGEST = 80.0  # exp of a larger number overflows in float32


def affine(x: Float[Array, "*b I"], weight, bias: nnx.Param, config) -> Float[Array, "*b O"]:
    """Return x weight + bias, for a weight [I,O] and a bias [O], in the type of the computation."""
    bias = cast(bias, config)
    return x @ weight[...].astype(config.dtype) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def dropped(x, rate: float, key):
    """Set a share `rate` of the values of x to zero, and divide the others by 1 - rate. Without a key, return x.

    The rate is rounded to a multiple of 1/256: random numbers of 8 bits cost a quarter of the time of 32 bits.
    """
    level = round(256 * rate)
    if key is None or not level:
        return x
    is_kept = jax.random.bits(key, x.shape, jnp.uint8) >= level
    return jnp.where(is_kept, x * (256 / (256 - level)), 0).astype(x.dtype)


def split_key(key, count: int) -> list:
    """Return `count` random keys; without a key, a list of None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class TreeAttention(nnx.Module):
    r"""The attention of the nodes of the tree to the source. It has one head.

    The query of a node with the vector x is q = LN(x query + query_bias), and the key of a source vector y is
    k = LN(y key + key_bias). With s_m = q . k_m / sqrt(H) over the keys m of the sentence, the weights are

    .. math:: softmax(s)_m \; \sigma(\log \textstyle\sum_m e^{s_m} - 2 \max_m s_m + \log 1000)

    They sum to less than 1: a node with a high score attends less. The original code means to add 10^-3 to the
    denominator of a softmax, but subtracts the maximum of the scores twice.
    """

    def __init__(self, config, key):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.query, self.query_bias = linear_weight(keys[0], c.H, c.H, c), linear_bias(keys[1], c.H, c.H, c)
        self.key, self.key_bias = linear_weight(keys[2], c.H, c.H, c), linear_bias(keys[3], c.H, c.H, c)
        self.query_norm, self.key_norm = LayerNorm(c), LayerNorm(c)

    def queries(self, x: Float[Array, "B n H"], key=None) -> Float[Array, "B n H"]:
        """Return the queries of nodes, divided by sqrt(H)."""
        c = self.config
        x = dropped(x, c.attention_dropout, key)
        return self.query_norm(affine(x, self.query, self.query_bias, c)) * c.H**-0.5

    def keys(self, y: Float[Array, "B M H"], key=None) -> Float[Array, "B M H"]:
        """Return the keys of source vectors."""
        c = self.config
        return self.key_norm(affine(dropped(y, c.attention_dropout, key), self.key, self.key_bias, c))


def attention_weights(scores: Float[Array, "B n M"], mask: Bool[Array, "B M"]) -> Float[Array, "B n M"]:
    """Return the weights of `TreeAttention` for the scores s. They are 0 where the mask of the keys is False.

    >>> attention_weights(jnp.array([[[0.0, 0.0, 9.0]]]), jnp.array([[True, True, False]])).round(4).tolist()
    [[[0.4998000144958496, 0.4998000144958496, 0.0]]]
    """
    scores = jnp.where(mask[:, None], scores.astype(sum_type(scores)), -jnp.inf)
    largest = scores.max(-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    weights = jnp.exp(scores - largest)
    sink = SINK * jnp.exp(jnp.minimum(largest, LARGEST))
    return weights / (weights.sum(-1, keepdims=True) + sink)
