"""The interface between `fused` and the backends Mosaic and Triton: a set of kernels for grouped matrix products."""

from typing import Any, Protocol, runtime_checkable

from .call import Rows
from .routing import Routing
from .tasks import Tasks, make_tasks


@runtime_checkable
class Kernels(Protocol):
    """The expert kernels of one backend. The object is hashable, so that it can be a static argument of a function.

    `source`, `target`, `numbers` and `.._numbers` are row numbers [tiles * M]: for every row of the tiles of `tasks`,
    its row in an array, or -1 if it has none (`tasks.row_numbers`). x[source] are the rows of x in this order, each of
    which is multiplied by the weight of the expert of its tile. R is the number of (token, choice) pairs. The hidden
    rows `h` are the pre-activations of `expert_mlp`, sorted by expert. Each backend chooses the shape of `h`: `product`
    takes this shape as `x`, and `d_weights` and `d_bias` take it as `right`.
    """

    def rows_of_tile(self, routing: Routing, x) -> int: ...

    def tasks(self, routing: Routing, x) -> Tasks:
        """Return the work list of the kernels for this routing and for rows x."""
        return make_tasks(routing, self.rows_of_tile(routing, x))

    def product(
        self, x, source, weight, tasks: Tasks, target, bias=None, *, first: int = 0, columns: int | None = None,
        transposed: bool = False,
    ) -> Any:  # fmt: skip
        """Return an array [R, columns] that has x[source] @ weight + bias in its rows `target`.

        The weight is [E, D, F], or [E, F, D] if `transposed`. Only `columns` of its F columns are used, from column
        `first` on. None means all columns.
        """

    def activated(self, activation: str, x, source, weight, tasks: Tasks, bias, *, keep: bool) -> tuple:
        """Return (act(h) [R, F],) or, with `keep`, (act(h) [R, F], h), where h = x[source] @ weight + bias.

        The rows of both results are sorted by expert.
        """

    def d_activated(self, activation: str, d_out, source, weight, tasks: Tasks, h, gates) -> tuple:
        """Return the derivatives (dh, gate * act(h) [R, F], <act(h), dy> [tiles * M]), where dh has the shape of h.

        The forward pass is the sum over the choices of a token of gate * act(h) @ weight, d_out is its cotangent, and
        dy = d_out[source] @ weight^T. <act(h), dy> is the gradient of the gate of every row of the tiles. `gates` is a
        result of `fused.by_tile`.
        """

    def d_gated(self, d_out, source, weight, tasks: Tasks, x, x_rows: Rows, gates, routing: Routing) -> tuple:
        """Return (gate * dy, gate * x, the row numbers of gate * x, <x, dy> [R]) for `expert_linear` with gates.

        They are the gradient of x, the left factor of the gradient of the weight, and the gradient of the gate of every
        pair, where dy = d_out[source] @ weight^T. gate * dy has its rows in the order of x. If x has one row per token,
        gate * dy has one row per pair.
        """

    def d_weights(self, left, left_numbers, right, right_numbers, tasks: Tasks) -> Any:
        """Return the gradient of the weights: for every expert, the sum of left[r]^T right[r] over its rows r.

        Row r is in row left_numbers[r] of `left` and in row right_numbers[r] of `right`.
        """

    def d_bias(self, bias, right, numbers, tasks: Tasks, gates=None) -> Any:
        """Return the gradient of `bias`, with the shape of `bias`: for every expert, the sum of its rows of `right`.

        With gates [T, k], each row is multiplied by its gate. Row r is in row numbers[r] of `right`.
        """
