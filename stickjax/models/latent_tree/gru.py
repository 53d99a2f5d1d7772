"""A bidirectional gated recurrent unit over padded sentences."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stickjax.models.layers import cast, uniform


class BidirectionalGRU(nnx.Module):
    """One layer of a gated recurrent unit (arXiv 1406.1078) in both directions, with H/2 units per direction.

    For an input x and the state h of one direction, with [a_r, a_z, a_n] = x @ input + input_bias and
    [b_r, b_z, b_n] = h @ recurrent + recurrent_bias, the next state is

      (1 - z) n + z h,   r = sigmoid(a_r + b_r),   z = sigmoid(a_z + b_z),   n = tanh(a_n + r b_n).

    The first axis of every parameter has the two directions: from left to right, and from right to left.
    """

    def __init__(self, config, key):
        self.config = c = config
        units = c.H // 2
        keys, limit = jax.random.split(key, 4), units**-0.5
        self.input = uniform(keys[0], (2, c.H, 3 * units), limit, c)
        self.input_bias = uniform(keys[1], (2, 3 * units), limit, c)
        self.recurrent = uniform(keys[2], (2, units, 3 * units), limit, c)
        self.recurrent_bias = uniform(keys[3], (2, 3 * units), limit, c)

    def __call__(
        self, x: Float[Array, "B S H"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B S H"], Float[Array, "B H"]]:
        """Return the states of both directions at every word [B,S,H], and the final states of both directions [B,H].

        The left-to-right direction has its final state at the last word. The right-to-left direction has its final
        state at the first word. The axis H of the results has first the H/2 units of the left-to-right direction, then
        the H/2 units of the right-to-left direction. `lengths` has the number of words of each sentence. The states at
        padding have no meaning.
        """
        c, (B, S, _) = self.config, x.shape
        place = jnp.arange(S)[None]
        mirrored = jnp.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)[..., None]
        both = jnp.stack([x, jnp.take_along_axis(x, mirrored, axis=1)])
        inputs = jnp.einsum("PBSI,PIO->SPBO", both, cast(self.input, c)) + cast(self.input_bias, c)[None, :, None]
        recurrent, bias = cast(self.recurrent, c), cast(self.recurrent_bias, c)[:, None]

        def step(h, a):
            a_r, a_z, a_n = jnp.split(a, 3, -1)
            b_r, b_z, b_n = jnp.split(jnp.einsum("PBI,PIO->PBO", h, recurrent) + bias, 3, -1)
            z = jax.nn.sigmoid(a_z + b_z)
            h = (1 - z) * jnp.tanh(a_n + jax.nn.sigmoid(a_r + b_r) * b_n) + z * h
            return h, h

        _, states = jax.lax.scan(step, jnp.zeros((2, B, c.H // 2), x.dtype), inputs)
        ahead, back = states.transpose(1, 2, 0, 3)
        end = jnp.maximum(lengths - 1, 0)[:, None, None]
        last = [jnp.take_along_axis(direction, end, axis=1)[:, 0] for direction in (ahead, back)]
        back = jnp.take_along_axis(back, mirrored, axis=1)
        return jnp.concatenate([ahead, back], -1), jnp.concatenate(last, -1)
