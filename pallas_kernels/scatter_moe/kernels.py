"""What Mosaic and Triton each give to `fused`: a set of kernels for grouped matrix products."""

from typing import Any, Protocol, runtime_checkable

from .call import Rows
from .routing import Routing
from .tasks import Tasks, make_tasks


@runtime_checkable
class Kernels(Protocol):
    """The kernels of one backend for the experts. They are hashable: `jax.custom_vjp` takes them as a static argument.

    `source`, `target` and `numbers` are row numbers: for every row of the tiles its row in an array, -1 where there is
    none (`tasks.row_numbers`). R is the number of (token, choice) pairs. The hidden rows `h` are sorted, and each set
    has its own form of them: `product` takes this form as x, and `d_weights` and `d_bias` take it as right.
    """

    def rows_of_tile(self, routing: Routing, x) -> int: ...

    def tasks(self, routing: Routing, x) -> Tasks:
        return make_tasks(routing, self.rows_of_tile(routing, x))

    def product(
        self, x, source, weight, tasks: Tasks, target, bias=None, *, first: int = 0, columns: int | None = None,
        transposed: bool = False,
    ) -> Any:  # fmt: skip
        """[R, columns]: x[source] @ weight + bias in the rows `target`, for `columns` columns from `first` on."""

    def activated(self, activation: str, x, source, weight, tasks: Tasks, bias, *, keep: bool) -> tuple:
        """(act(h) [R, F], and with `keep` also h) of h = x[source] @ weight + bias, in sorted rows."""

    def d_activated(self, activation: str, d_out, source, weight, tasks: Tasks, h, gates) -> tuple:
        """(dh in the form of h, gate * act(h) [R, F], <act(h), dy> for the rows of the tiles).

        dy = d_out[source] @ weight^T. `gates` as from `fused.by_tile`.
        """

    def d_gated(self, d_out, source, weight, tasks: Tasks, x, x_rows: Rows, gates, routing: Routing) -> tuple:
        """(gate * dy, gate * x, the row numbers of gate * x, <x, dy> of every pair) of a linear map with gates.

        dy as in `d_activated`. gate * dy has the order of x, or one row per pair if x has one row per token.
        """

    def d_weights(self, left, left_numbers, right, right_numbers, tasks: Tasks) -> Any:
        """The sums of left^T right over the rows of every expert."""

    def d_bias(self, bias, right, numbers, tasks: Tasks, gates=None) -> Any:
        """The sums of right over the rows of every expert, each times its gate if there are gates [T, k]."""
