"""Floating-point operations and least memory traffic of the ops, for the limits in the tables.

Letters as in the rest of the code. A multiply-add is two operations. Bytes count every input once and every output
once, as if an ideal kernel moved them.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def limits(self, ceilings: "Ceilings") -> dict[str, float]:
        """Return the milliseconds that the operations and the bytes take at the machine's measured ceilings."""
        return {
            "limit: compute": 1e3 * self.flops / ceilings.flops,
            "limit: bytes": 1e3 * self.bytes / ceilings.bytes,
        }


class Ceilings(NamedTuple):
    """The machine's measured speed: FLOP/s of a large matrix product, bytes/s (read plus written) of a large copy."""

    flops: float
    bytes: float


def matmul(m: int, n: int, k: int, itemsize: int = 4) -> Cost:
    return Cost(2 * m * n * k, itemsize * (m * k + k * n + m * n))


def stick_breaking(
    B: int, T: int, N: int, H: int, *, K: int | None = None, itemsize: int = 4, backward: bool = False
) -> Cost:
    """Return the cost of causal attention.

    Forward does two products over T^2 / 2 scores; `backward` adds five, because it recomputes the scores. Forward reads
    q, k, v and writes out and rem (fp32). Backward reads q, k, v, dout, drem and writes dq, dk, dv.
    """
    query, keys, sticks = itemsize * B * T * N * H, itemsize * B * T * (K or N) * H, 4 * B * T * N
    product = 2 * B * N * (T * T / 2) * H
    cost = Cost(2 * product, 2 * query + 2 * keys + sticks)
    return cost + Cost(5 * product, 3 * query + 4 * keys + sticks) if backward else cost


def experts(T: int, k: int, D: int, F: int, E: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Return the cost of gated expert networks.

    Forward does three products with [D, F] matrices per row; `backward` adds six. Forward reads x, the weights, gates
    (fp32) and indices, and writes out. Backward reads x, dout, the weights, gates and indices, and writes dx and the
    gradients of the weights and gates. All weights are counted as read, even if E is above T * k.
    """
    tokens, weights, gates = itemsize * T * D, itemsize * 3 * E * D * F, 4 * T * k
    product = 6 * T * k * D * F
    cost = Cost(product, 2 * tokens + weights + 2 * gates)
    return cost + Cost(2 * product, 3 * tokens + 2 * weights + 3 * gates) if backward else cost
