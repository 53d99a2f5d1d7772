"""The cost of an op: its floating-point operations and its least memory traffic. Each gives a lower bound of the time.

Letters: batch size B, sequence length T (for experts: number of tokens T), N query heads, K key heads, head width H,
model width D, expert width F, E experts, k experts per token. A multiply-add counts as two operations. The traffic
counts every input and every output once, because an ideal kernel reads or writes each of them once.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """The floating-point operations of an op, and the bytes that it reads and writes."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def limits(self, ceilings: "Ceilings") -> dict[str, float]:
        """Return two lower bounds of the time, in milliseconds: {"limit: compute": .., "limit: bytes": ..}.

        The first is the time of the floating-point operations alone, the second the time of the memory traffic alone.
        `ceilings`: the speed of the machine.
        """
        return {
            "limit: compute": 1e3 * self.flops / ceilings.flops,
            "limit: bytes": 1e3 * self.bytes / ceilings.bytes,
        }


class Ceilings(NamedTuple):
    """The measured speed of the machine. `Cost.limits` computes from it the least time that an op can take.

    `flops`: FLOP/s in a large matrix product. `bytes`: bytes/s in a large copy, where a copied byte counts twice: it is
    read and written.
    """

    flops: float
    bytes: float


def matmul(m: int, n: int, k: int, itemsize: int = 4) -> Cost:
    return Cost(2 * m * n * k, itemsize * (m * k + k * n + m * n))


def stick_breaking(
    B: int, T: int, N: int, H: int, *, K: int | None = None, itemsize: int = 4, backward: bool = False
) -> Cost:
    """Return the cost of causal stick-breaking attention: of the forward pass, or of both passes together.

    `backward`: whether the backward pass is included. `K` None means N key heads. `itemsize`: bytes per element of q,
    k, v and out.

    The forward pass computes two matrix products over T^2 / 2 scores per head. The backward pass computes five, because
    it recomputes the scores. The forward pass reads q, k, v. It writes out and rem (fp32), the part of each stick that
    remains. The backward pass reads q, k, v and the cotangents dout, drem. It writes the gradients dq, dk, dv.
    """
    query, keys, sticks = itemsize * B * T * N * H, itemsize * B * T * (K or N) * H, 4 * B * T * N
    product = 2 * B * N * (T * T / 2) * H
    cost = Cost(2 * product, 2 * query + 2 * keys + sticks)
    return cost + Cost(5 * product, 3 * query + 4 * keys + sticks) if backward else cost


def experts(T: int, k: int, D: int, F: int, E: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """Return the cost of gated expert networks: of the forward pass, or of both passes together.

    `backward`: whether the backward pass is included. `itemsize`: bytes per element of x and the weights.

    For each of the T * k (token, choice) pairs, the forward pass computes three products with [D, F] matrices, and the
    backward pass six. The forward pass reads x, the weights, the gates (fp32) and the expert indices. It writes
    the output [T, D]. The backward pass reads x, the cotangent of the output, the weights, gates and indices. It writes
    the gradients of x, the weights and the gates. All weights count as read, even if an expert has no tokens.
    """
    tokens, weights, gates = itemsize * T * D, itemsize * 3 * E * D * F, 4 * T * k
    product = 6 * T * k * D * F
    cost = Cost(product, 2 * tokens + weights + 2 * gates)
    return cost + Cost(2 * product, 3 * tokens + 2 * weights + 3 * gates) if backward else cost
