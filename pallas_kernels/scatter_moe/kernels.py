"""The interface between `fused` and its backends, Mosaic and Triton: a set of kernels for grouped matrix products."""

from typing import Any, Protocol, runtime_checkable

from .call import Rows
from .routing import Routing
from .tasks import Tasks, make_tasks


@runtime_checkable
class Kernels(Protocol):
    """The expert kernels of one backend, Mosaic or Triton.

    The object is hashable, so that it can be a static argument of a jitted function.

    `tasks` cuts the rows of the experts into tiles of M rows. A tile has rows of one expert e, and R is the number of
    (token, choice) pairs. The arguments `source`, `target`, `numbers`, `left_numbers` and `right_numbers` are int32
    [tiles * M]: for every row i of the tiles, the index of this row in an array, or -1 if tile row i is empty
    (`tasks.row_numbers`). For example, x[source[i]] is the row of x for tile row i.

    h is the pre-activation of `expert_mlp`, with rows sorted by expert. Each backend chooses the shape of h. `product`
    accepts this shape as `x`, and `d_weights` and `d_bias` accept it as `right`.
    """

    def rows_of_tile(self, routing: Routing, x) -> int: ...

    def tasks(self, routing: Routing, x) -> Tasks:
        """Return the work list of the kernels: the (token, choice) pairs, sorted by expert and cut into tiles.

        x is the array whose rows are multiplied. The number of rows of a tile depends on the routing and on x.
        """
        return make_tasks(routing, self.rows_of_tile(routing, x))

    def product(
        self, x, source, weight, tasks: Tasks, target, bias=None, *, first: int = 0, columns: int | None = None,
        transposed: bool = False,
    ) -> Any:  # fmt: skip
        """Return an array `out` [R, columns] with out[target[i]] = x[source[i]] @ weight[e] + bias[e].

        The kernel does this for every row i of the tiles in `tasks`, where e is the expert of the tile. R is the number
        of (token, choice) pairs. The weight is [E, D, F], or [E, F, D] if `transposed`. Of its F columns, `columns` are
        used, from column `first` on. If `columns` is None, all columns are used. A bias [E, F] of None is zero.
        """

    def activated(self, activation: str, x, source, weight, tasks: Tasks, bias, *, keep: bool) -> tuple:
        """Return (act(h) [R, F],) or, with `keep`, (act(h) [R, F], h), where h = x[source] @ weight[e] + bias[e].

        For every row of the tiles in `tasks`, `source` has the index of its row in x, and e is the expert of the tile.
        The rows of both results are sorted by expert. `activation` is the name of act, such as "swiglu". `weight` and
        `bias` are w_in and b_in of `expert_mlp`. R is the number of (token, choice) pairs.
        """

    def d_activated(self, activation: str, d_out, source, weight, tasks: Tasks, h, gates) -> tuple:
        """Return (dh, gate * act(h) [R, F], <act(h), dy> [tiles * M]), for the backward pass of `expert_mlp`.

        The output of a token is the sum over its choices of gate * act(h) @ weight[e], where h is the pre-activation
        and `weight` is w_out [E, F, D]. d_out [T, D] is the cotangent of the output, and
        dy = d_out[source] @ weight[e]^T. `gates` [tiles * M] has the gate of every row of the tiles in `tasks`
        (`fused.by_tile`).

        `dh`: the gradient of h, in the shape of h: gate * dy times the derivative of act.
        `gate * act(h)`: not a derivative. `d_weights` takes it as `left`, for the gradient of the weight.
        `<act(h), dy>`: for every row of the tiles, the gradient of its gate, except for the term <bias, d_out>,
          which the caller adds.
        """

    def d_gated(self, d_out, source, weight, tasks: Tasks, x, x_rows: Rows, gates, routing: Routing) -> tuple:
        """Return (gate * dy, gate * x, left_numbers, <x, dy> [R]), for the backward pass of `expert_linear` with gates.

        d_out [T, F] is the cotangent of the output, and dy = d_out[source] @ weight[e]^T. `x_rows` is the order of the
        rows of x: "token", "pair" or "sorted".

        `gate * dy`: the gradient of x, with rows in the order of x. If x has one row per token, this gradient has one
          row per (token, choice) pair, and the caller sums the k rows of a token.
        `gate * x`, `left_numbers`: the arguments `left` and `left_numbers` of `d_weights`, for the gradient of the
          weight.
        `<x, dy>`: the gradient of the gate of every pair, except for the term <bias, d_out>, which the caller adds.
        """

    def d_weights(self, left, left_numbers, right, right_numbers, tasks: Tasks) -> Any:
        """Return the gradient of the weights of all experts. The caller reshapes it to [E, D, F].

        For every expert, it is the sum of left[left_numbers[i]]^T right[right_numbers[i]] over all rows i of the tiles
        of this expert in `tasks`. Rows of `left` have D elements, and rows of `right` have F elements.
        """

    def d_bias(self, bias, right, numbers, tasks: Tasks, gates=None) -> Any:
        """Return the gradient of `bias`, with the shape of `bias`: for every expert, the sum of right[numbers[i]].

        The sum is over all rows i of the tiles of this expert in `tasks`. With gates [T, k], each term is multiplied by
        the gate of its (token, choice) pair.
        """
