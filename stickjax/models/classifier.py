"""The output layer of a classifier: from the vectors of one or two sentences to the logits of the labels."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from stickjax.models.layers import cast, linear_bias, linear_weight


def compared(u: Float[Array, "B D"], v: Float[Array, "B D"]) -> Float[Array, "B 4D"]:
    """Concatenate u, v, u * v and |u - v|: the features of pairs of sentences that have the vectors u and v."""
    return jnp.concatenate([u, v, u * v, jnp.abs(u - v)], -1)


class Classifier(nnx.Module):
    """Computes the logits of the labels from the features x of an example.

    Without a hidden layer, the logits are x w_out + out_bias. With a hidden layer, the logits are
    elu(x w_in + in_bias) w_out + out_bias. `width` is F, the number of features. `hidden` is the number of hidden
    units; 0 means no hidden layer.
    """

    def __init__(self, config, key, width: int, hidden: int):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.w_in = linear_weight(keys[0], width, hidden, c) if hidden else None
        self.in_bias = linear_bias(keys[1], width, hidden, c) if hidden else None
        last = hidden or width
        self.w_out, self.out_bias = linear_weight(keys[2], last, c.classes, c), linear_bias(keys[3], last, c.classes, c)

    def __call__(self, x: Float[Array, "B F"], dropped=lambda x, index: x) -> Float[Array, "B classes"]:
        """Return the logits in float32.

        `dropped(x, index)` applies dropout to x, with a different mask for each index.
        """
        c, x = self.config, dropped(x, 0)
        if self.w_in is not None:
            x = dropped(jax.nn.elu(x @ cast(self.w_in, c) + cast(self.in_bias, c)[None]), 1)
        return (x @ cast(self.w_out, c) + cast(self.out_bias, c)[None]).astype(jnp.float32)
