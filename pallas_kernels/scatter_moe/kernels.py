"""The interface between `fused` and the backends Mosaic and Triton: a set of kernels for grouped matrix products."""

from typing import Any, Protocol, runtime_checkable

from .call import Rows
from .routing import Routing
from .tasks import Tasks, make_tasks


@runtime_checkable
class Kernels(Protocol):
    """The expert kernels of one backend. They are hashable, because `jax.custom_vjp` takes them as a static argument.

    `source`, `target` and `numbers` are row numbers: for every row of the tiles, its row in an array, or -1 if it has
    none (`tasks.row_numbers`). R is the number of (token, choice) pairs. The hidden rows `h` are sorted. Each backend
    chooses the shape of `h`. `product` takes this shape as `x`, and `d_weights` and `d_bias` take it as `right`.
    """

    def rows_of_tile(self, routing: Routing, x) -> int: ...

    def tasks(self, routing: Routing, x) -> Tasks:
        return make_tasks(routing, self.rows_of_tile(routing, x))

    def product(
        self, x, source, weight, tasks: Tasks, target, bias=None, *, first: int = 0, columns: int | None = None,
        transposed: bool = False,
    ) -> Any:  # fmt: skip
        """Return [R, columns], which has x[source] @ weight + bias in the rows `target`.

        Only `columns` columns of the weight are used, from column `first` on.
        """

    def activated(self, activation: str, x, source, weight, tasks: Tasks, bias, *, keep: bool) -> tuple:
        """Return (act(h) [R, F], and with `keep` also h) of h = x[source] @ weight + bias, in sorted rows."""

    def d_activated(self, activation: str, d_out, source, weight, tasks: Tasks, h, gates) -> tuple:
        """Return (dh with the shape of h, gate * act(h) [R, F], <act(h), dy> for every row of the tiles).

        dy = d_out[source] @ weight^T. `gates` is a result of `fused.by_tile`.
        """

    def d_gated(self, d_out, source, weight, tasks: Tasks, x, x_rows: Rows, gates, routing: Routing) -> tuple:
        """Return (gate * dy, gate * x, the row numbers of gate * x, <x, dy> of every pair) of a linear map with gates.

        dy is the same as in `d_activated`. gate * dy has the order of x. If x has one row per token, gate * dy has one
        row per pair.
        """

    def d_weights(self, left, left_numbers, right, right_numbers, tasks: Tasks) -> Any:
        """Return, for every expert, the sum of left[r]^T right[r] over its rows r."""

    def d_bias(self, bias, right, numbers, tasks: Tasks, gates=None) -> Any:
        """Return, for every expert, the sum of its rows of `right`.

        With gates [T, k], each row is multiplied by its gate.
        """
