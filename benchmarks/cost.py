"""Floating-point operations and least memory traffic of the ops: the limits that stand in every table.

Letters as in the rest of the code. A multiply-add is two operations. Bytes count every input once and every output
once: what an ideal kernel would move.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def limits(self, ceilings: "Ceilings") -> dict[str, float]:
        """Milliseconds at the machine's measured ceilings."""
        return {
            "limit: compute": 1e3 * self.flops / ceilings.flops,
            "limit: bytes": 1e3 * self.bytes / ceilings.bytes,
        }


class Ceilings(NamedTuple):
    """What the machine reaches: FLOP/s of a large matrix product, bytes/s (read plus written) of a large copy."""

    flops: float
    bytes: float


def matmul(m: int, n: int, k: int, itemsize: int = 4) -> Cost:
    return Cost(2 * m * n * k, itemsize * (m * k + k * n + m * n))


def stick_breaking(
    B: int, T: int, N: int, H: int, *, K: int | None = None, itemsize: int = 4, backward: bool = False
) -> Cost:
    """Causal attention: two products over T^2 / 2 scores forward; with `backward`, five more (recomputing the scores).

    Forward reads q, k, v and writes out and rem (fp32); backward reads q, k, v, dout, drem and writes dq, dk, dv.
    """
    query, keys, sticks = itemsize * B * T * N * H, itemsize * B * T * (K or N) * H, 4 * B * T * N
    product = 2 * B * N * (T * T / 2) * H
    cost = Cost(2 * product, 2 * query + 2 * keys + sticks)
    return cost + Cost(5 * product, 3 * query + 4 * keys + sticks) if backward else cost


def experts(T: int, k: int, D: int, F: int, E: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Gated expert networks: three products of [D, F] per row forward; with `backward`, twice that more.

    Forward reads x, the weights, gates (fp32) and indices, and writes out; backward reads x, dout, the weights, gates
    and indices, and writes dx, the weights' and the gates' gradients. An E above T * k still reads every weight.
    """
    tokens, weights, gates = itemsize * T * D, itemsize * 3 * E * D * F, 4 * T * k
    product = 6 * T * k * D * F
    cost = Cost(product, 2 * tokens + weights + 2 * gates)
    return cost + Cost(2 * product, 3 * tokens + 2 * weights + 3 * gates) if backward else cost
