"""The rows of all experts cut into tiles, each of one expert: the work list of the GPU kernels, made once per layer.

A tile never straddles two experts, an expert without rows has none, and nothing is unrolled over the experts. Slots
without an expert form tiles of "expert" E, which gives zeros: every row of every result is written by somebody.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .call import Rows
from .routing import Routing, first_places


class Tasks(NamedTuple):
    """Tiles of M rows, of which `count` [1] are in use; there are as many as there can ever be.

    `expert` [tiles], sorted. `first` [E] and `rows` [E]: the first tile and the number of rows of every expert.
    `slots`, `sorted` [tiles * M]: slot and sorted row of every row of a tile, -1 where there is none. `place` [R]: the
    row in tiles of every slot.
    """

    expert: jax.Array
    count: jax.Array
    first: jax.Array
    rows: jax.Array
    slots: jax.Array
    sorted: jax.Array
    place: jax.Array


def tasks(routing: Routing, M: int) -> Tasks:
    R, E = routing.order.shape[0], routing.num_experts
    starts = routing.offsets
    rows = jnp.append(routing.counts, R - starts[-1]).astype(jnp.int32)
    tiles = -(-rows // M)
    ends = jnp.cumsum(tiles).astype(jnp.int32)
    number = jnp.arange(R // M + min(E + 1, R), dtype=jnp.int32)
    expert = jnp.minimum(first_places(ends, number, after=True), E)
    before = ends - tiles
    row = starts[expert] + (number - before[expert]) * M
    position = row[:, None] + jnp.arange(M, dtype=jnp.int32)[None]
    exists = position < (starts[expert] + rows[expert])[:, None]
    position = jnp.where(exists, position, -1).reshape(-1)
    slots = jnp.where(position < 0, -1, routing.order[jnp.maximum(position, 0)])
    own = jnp.minimum(routing.expert_indices.reshape(-1).astype(jnp.int32), E)
    place = before[own] * M + routing.inverse - starts[own]
    return Tasks(expert, ends[-1:], before[:E], rows[:E], slots, position, place)


def row_numbers(tasks: Tasks, rows: Rows, k: int):
    """The row of an array in this order that every row of a tile stands for, int32 [tiles * M]; -1: none."""
    if rows == "sorted":
        return tasks.sorted
    return tasks.slots if rows == "slot" else jnp.where(tasks.slots < 0, -1, tasks.slots // k)
