"""Tasks: the rows of all experts, cut into tiles. They are the work list of the GPU kernels, made once per layer.

A tile has rows of one expert only, and an expert without rows has no tile. The program does not grow with the number of
experts. (token, choice) pairs without an expert form the tiles of an additional expert E. The results of these tiles
are zero. So every row of every result is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .call import Rows
from .routing import Routing, first_positions


class Tasks(NamedTuple):
    """A list of tiles of M rows. It is long enough for every routing, and the first `count` [1] tiles are in use.

    `expert` [tiles]: the expert of every tile, sorted. `first` [E] and `rows` [E]: the first tile and the number of
    rows of every expert. `pairs`, `sorted` [tiles * M]: for every row of the tiles, the number of its pair and of its
    sorted row, or -1 if the row is empty. `tile_row` [R]: for every pair, its row in the tiles.
    """

    expert: jax.Array
    count: jax.Array
    first: jax.Array
    rows: jax.Array
    pairs: jax.Array
    sorted: jax.Array
    tile_row: jax.Array

    @property
    def num_pairs(self) -> int:
        """The number R of (token, choice) pairs."""
        return self.tile_row.shape[0]

    @property
    def rows_of_tile(self) -> int:
        """The number M of rows of a tile."""
        return self.pairs.shape[0] // self.expert.shape[0]


def make_tasks(routing: Routing, M: int) -> Tasks:
    """Return the tasks of a routing, in tiles of M rows."""
    R, E = routing.order.shape[0], routing.num_experts
    starts = routing.offsets
    rows = jnp.append(routing.counts, R - starts[-1]).astype(jnp.int32)
    tiles = -(-rows // M)
    ends = jnp.cumsum(tiles).astype(jnp.int32)
    number = jnp.arange(R // M + min(E + 1, R), dtype=jnp.int32)
    expert = jnp.minimum(first_positions(ends, number, after=True), E)
    before = ends - tiles
    row = starts[expert] + (number - before[expert]) * M
    position = row[:, None] + jnp.arange(M, dtype=jnp.int32)[None]
    exists = position < (starts[expert] + rows[expert])[:, None]
    position = jnp.where(exists, position, -1).reshape(-1)
    pairs = jnp.where(position < 0, -1, routing.order[jnp.maximum(position, 0)])
    expert_of_pair = jnp.minimum(routing.expert_indices.reshape(-1).astype(jnp.int32), E)
    tile_row = before[expert_of_pair] * M + routing.inverse - starts[expert_of_pair]
    return Tasks(expert, ends[-1:], before[:E], rows[:E], pairs, position, tile_row)


def row_numbers(tasks: Tasks, rows: Rows, k: int):
    """Return, for every row of the tiles, its row in an array with the order `rows`, or -1: int32 [tiles * M]."""
    if rows == "sorted":
        return tasks.sorted
    return tasks.pairs if rows == "pair" else jnp.where(tasks.pairs < 0, -1, tasks.pairs // k)
