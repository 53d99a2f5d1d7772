"""The interface to the GPU kernels of the experts: `mosaic.py` and `triton.py` implement it, `fused.py` calls it."""

from typing import Any, Protocol, runtime_checkable

from .call import Rows
from .routing import Routing
from .tasks import Tasks, make_tasks


@runtime_checkable
class Kernels(Protocol):
    """The GPU kernels of `expert_linear` and `expert_mlp`, written in Mosaic or in Triton.

    The object is hashable, so that it can be a static argument of a jitted function. Its methods share these terms:

    `tasks`: the R = T * k (token, choice) pairs, sorted by expert and cut into tiles of M rows. All rows of a tile
      belong to one expert. A row of a tile is one pair. The last tile of an expert is filled up with empty rows.
      Pairs without an expert form tiles of an additional expert with the number E. Their rows of the results are zero.
    `source`, `target`, `numbers`, `left_numbers`, `right_numbers`: int32 [tiles * M]. The rows of all tiles are
      numbered i = 0, 1, and so on. Entry i is the index of a row in another array, or -1 if row i is empty. For
      example, x[source[i]] is the row of x that the kernel multiplies for row i of the tiles.
    `h`: the pre-activation x @ w_in + b_in of `expert_mlp`, with rows sorted by expert. Its shape differs between
      Mosaic and Triton. `product` accepts this shape as `x`, and `d_weights` and `d_bias` accept it as `right`.
    """

    def rows_of_tile(self, routing: Routing, x) -> int:
        """Return M, the number of rows of a tile, for this routing and for `x`, the array that is multiplied."""

    def tasks(self, routing: Routing, x) -> Tasks:
        """Sort the (token, choice) pairs of `routing` by expert, cut them into tiles of rows, and return the tiles.

        The kernels multiply rows of x. The number of rows of a tile depends on the routing and on x.
        """
        return make_tasks(routing, self.rows_of_tile(routing, x))

    def product(
        self, x, source, weight, tasks: Tasks, target, bias=None, *, first: int = 0, columns: int | None = None,
        transposed: bool = False,
    ) -> Any:  # fmt: skip
        """Multiply rows of x by the weights of their experts. Return `out` [R, columns].

        For every row i of the tiles in `tasks`,

          out[target[i]] = x[source[i]] @ weight[e] + bias[e],

        where e is the expert of the tile. R is the number of (token, choice) pairs. `source` and `target` have a row
        index for every row of the tiles, or -1 for an empty row. The weight is [E, D, F], or [E, F, D] if `transposed`.
        The bias is [E, F], or None for zero. `out` has `columns` columns of the product, from column `first` on. If
        `columns` is None, it has all F columns.
        """

    def activated(self, activation: str, x, source, weight, tasks: Tasks, bias, *, keep: bool) -> tuple:
        """Compute the hidden layer of `expert_mlp`. Return (act(h),), or (act(h), h) if `keep`.

        The row of the pre-activation h for row i of the tiles in `tasks` is

          x[source[i]] @ weight[e] + bias[e],

        where e is the expert of the tile. `source` has the index of a row of x for every row of the tiles, or -1 for
        an empty row. `activation` is the name of act, such as "swiglu". `weight` and `bias` are w_in and b_in of
        `expert_mlp`. The rows of both results are sorted by expert. act(h) is [R, F], where R is the number of
        (token, choice) pairs.
        """

    def d_activated(self, activation: str, d_out, source, weight, tasks: Tasks, h, gates) -> tuple:
        """Compute the backward pass of gate * act(h) @ weight[e], the output of one expert in `expert_mlp` before its
        bias b_out is added.

        h is the pre-activation, with rows sorted by expert. `weight` [E, F, D] is w_out of `expert_mlp`, and
        d_out [T, D] is the cotangent of its output. Row i of the tiles in `tasks` belongs to token source[i] and expert
        e, and its gate is gates[i]. For this row, the cotangent of gate * act(h) is

          dy = d_out[source[i]] @ weight[e]^T.

        Return (dh, gated, d_gate):

        `dh`: the gradient of h, in the shape of h: gate * dy * act'(h).
        `gated` [R, F]: gate * act(h), with rows sorted by expert. The caller multiplies it by d_out for the gradient of
          the weight.
        `d_gate`: for every row of the tiles, the dot product <act(h), dy>. The gradient of the gate of the row is this
          number plus <b_out[e], d_out[source[i]]>. The caller adds the second term.
        """

    def d_gated(self, d_out, source, weight, tasks: Tasks, x, x_rows: Rows, gates, routing: Routing) -> tuple:
        """Compute the backward pass of gate * (x @ weight[e]), the output of one expert in `expert_linear` with gates.

        x and `weight` [E, D, F] are the arguments of `expert_linear`, and d_out [T, F] is the cotangent of its output.
        Row i of the tiles in `tasks` belongs to token source[i] and expert e. The cotangent of gate * x for this row is

          dy = d_out[source[i]] @ weight[e]^T.

        `x_rows` says how the rows of x are ordered: "token", "pair" or "sorted", as in `call.Rows`. `gates` is [T, k].
        Return (dx, gated, gated_numbers, d_gate):

        `dx`: the gradient of x, gate * dy. If x has one row per token, dx has one row per (token, choice) pair, and the
          caller sums the k rows of a token. Otherwise the rows of dx have the order of the rows of x.
        `gated`: the array gate * x.
        `gated_numbers`: row i of the tiles is row gated_numbers[i] of `gated`. The caller passes `gated` and
          `gated_numbers` to `d_weights`, as `left` and `left_numbers`, for the gradient of the weight.
        `d_gate`: for every (token, choice) pair, the dot product <x, dy>. The gradient of the gate of the pair is this
          number plus <bias[e], d_out[t]>, where t is the token. The caller adds the second term.
        """

    def d_weights(self, left, left_numbers, right, right_numbers, tasks: Tasks) -> Any:
        """Compute the gradients of the weights of all experts. The caller reshapes the result to [E, D, F].

        The gradient of weight[e] is

          sum_i left[left_numbers[i]]^T @ right[right_numbers[i]],

        where i runs over the rows of the tiles of expert e in `tasks`. `left` has rows of D elements, the inputs of the
        matrix products. `right` has rows of F elements, the cotangents of the results. `left_numbers` and
        `right_numbers` have a row index for every row of the tiles, or -1 for an empty row.
        """

    def d_bias(self, bias, right, numbers, tasks: Tasks, gates=None) -> Any:
        """Compute the gradient of `bias` [E, F]: for every expert, the sum of the cotangents of its outputs.

        `right` has rows of F elements, the cotangents. The gradient of bias[e] is the sum of right[numbers[i]] over the
        rows i of the tiles of expert e in `tasks`. `numbers` has a row index for every row of the tiles, or -1 for an
        empty row. With gates [T, k], each cotangent is first multiplied by the gate of its (token, choice) pair.
        """
