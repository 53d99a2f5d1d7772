"""Tasks: the sorted rows of all experts, cut into tiles of rows. They are the work list of the GPU kernels.

A tile has rows of one expert only, and an expert without rows has no tile. The program does not grow with the number of
experts. The (token, choice) pairs without an expert form the tiles of an additional expert E. The results of these
tiles are zero. So every row of every result is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .call import Rows
from .routing import Routing, first_positions


class Tasks(NamedTuple):
    """A list of tiles of M rows, long enough for every routing of R pairs. The first `count` [1] tiles are in use.

    `expert` [tiles]: the expert of every tile, in ascending order. `first` [E]: the first tile of every expert. `rows`
    [E]: the number of rows of every expert. The rows of all tiles have the numbers tile * M + row. `pairs`
    [tiles * M]: the (token, choice) pair in every row of the tiles, or -1 if the row is empty. `sorted` [tiles * M]:
    the same, with the sorted row of the `Routing` in place of the pair. `tile_row` [R]: the row of every pair in the
    tiles.
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
    """Return the work list of a routing, in tiles of M rows."""
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
    """Return, for every row of the tiles, the number of its row in an array, or -1 if it is empty: int32 [tiles * M].

    `rows` says how the rows of the array are ordered: by token, by pair, or sorted by expert. Every token has k pairs.
    """
    if rows == "sorted":
        return tasks.sorted
    return tasks.pairs if rows == "pair" else jnp.where(tasks.pairs < 0, -1, tasks.pairs // k)
