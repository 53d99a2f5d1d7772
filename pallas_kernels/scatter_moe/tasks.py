"""The work list of the GPU kernels: the (token, choice) pairs, sorted by expert and cut into tiles of rows.

A row is one pair. All rows of a tile belong to one expert, and an expert without rows has no tile. A kernel takes its
tiles from this list, so the size of the compiled program does not depend on the number of experts.

The experts have the numbers 0 to E - 1. Some pairs may have no expert. They form tiles of an additional expert with the
number E, and the kernels write zeros for them. So every row of every result is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .call import Rows
from .routing import Routing, first_positions


class Tasks(NamedTuple):
    """The R (token, choice) pairs, sorted by expert and cut into tiles of M rows, as arrays of int32.

    A row is one pair, and all rows of a tile belong to one expert. The last tile of an expert is filled up with empty
    rows. The rows of all tiles are numbered: row m of tile i has the number i * M + m. The arrays have room for any
    routing of R pairs to E experts. Only the first `count` tiles are in use.

    `expert`: [tiles], the expert of every tile, in ascending order. E means no expert.
    `count`: [1], the number of tiles in use.
    `first`: [E], the index of the first tile of every expert.
    `rows`: [E], the number of pairs of every expert.
    `pairs`: [tiles * M], for every row the number of its pair, token * k + choice, or -1 for an empty row.
    `sorted`: [tiles * M], for every row the index of its pair in the list sorted by expert, or -1 for an empty row.
    `tile_row`: [R], for every pair the number of its row in the tiles. Entry t * k + s is for choice s of token t.
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
    """Cut the (token, choice) pairs of `routing`, sorted by expert, into tiles of M rows. Return the `Tasks`."""
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
    """Return, for every row of the tiles, the index of its row in an array, or -1 if it is empty: int32 [tiles * M].

    `rows` says how the rows of the array are ordered: "token" (one row per token), "pair" (one row per (token, choice)
    pair) or "sorted" (one row per pair, sorted by expert). k is the number of choices of a token, and M is the number
    of rows of a tile.
    """
    if rows == "sorted":
        return tasks.sorted
    return tasks.pairs if rows == "pair" else jnp.where(tasks.pairs < 0, -1, tasks.pairs // k)
