"""The calls that absent_gpu.py compiles. KERNELS maps the name of a call to a function that returns a `Kernel`.

To add a call, write a function that returns a `Kernel` and enter the function in KERNELS. If the function needs an
import from the CUDA wheels, put the import inside the function.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import expert_linear, expert_mlp, route, stick_breaking_attention
from pallas_kernels.stick_breaking import mosaic


class Kernel(NamedTuple):
    """A function that runs GPU kernels, with the shapes of its arguments, so that it can be compiled without a GPU."""

    function: Callable  # a function of arrays with the shapes `shapes`; not jitted
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    # The number of iterations of each main loop, summed over all warpgroups. The kernels are in the order of their
    # names, and the loops of a kernel in the order of its code.
    tiles: tuple[int, ...]
    scores: int = 32  # attention scores per thread and iteration: a tile of 64 x 64 scores, divided by 128 threads


def softmax_mosaic() -> Kernel:
    """Return a call to compile: the kernel for causal softmax attention on Hopper GPUs that is a part of JAX.

    It is compared with the stick-breaking kernels. The inputs are float16, because the kernel always uses this type in
    its scratch memory.
    """
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    B, T, N, H, block_q, block_kv = 4, 4096, 12, 128, 64, 128
    config = attention_mgpu.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=2, causal=True)
    # For each block of queries, the key blocks that lie completely left of the diagonal run first, without a mask. Then
    # the key blocks on the diagonal run, with a mask.
    unmasked = [start // block_kv for start in range(0, T, block_q)]
    every = [-(-(start + block_q) // block_kv) for start in range(0, T, block_q)]
    return Kernel(
        lambda query, key, value: attention_mgpu.attention(query, key, value, config),
        (jax.ShapeDtypeStruct((B, T, N, H), jnp.float16),) * 3,
        tiles=(B * N * sum(unmasked), B * N * (sum(every) - sum(unmasked))),
        scores=block_q * block_kv // 128,
    )


def stick_breaking(
    *,
    B: int = 4,
    T: int = 4096,
    N: int,
    H: int,
    Hv: int | None = None,
    document: int | None = None,
    backward: bool = False,
    **options,
) -> Kernel:
    """Return a call to compile: causal stick-breaking attention, in tiles of 64 queries and 64 keys.

    The arrays have B sequences of T tokens, N heads, queries and keys of width H, and values of width `Hv` (None: H).
    `document`: the number of tokens of each packed document, a multiple of 128; None: one document per sequence.
    `backward`: whether to compile the gradients too. `options`: keyword arguments of `stick_breaking_attention`. With
    `skip_below`, the number of skipped tiles depends on the data. So `Kernel.tiles` has the numbers of loop iterations
    without skipping.
    """
    n, copies = (document or T) // 64, B * N * (T // (document or T))
    whole, diagonal = copies * n * (n - 1) // 2, copies * n
    Hv = Hv or H
    # The gradient kernel of keys and values takes query tiles in pairs, one tile for each warpgroup. Only pairs without
    # a tile on or above the diagonal run without a mask. At widths above 128 each warpgroup takes half of every tile.
    pairs = copies * sum(n // 2 - 1 - j // 2 for j in range(n))
    d_key_value = (pairs if max(H, Hv) <= 128 else whole, diagonal) * 2
    forward, d_query = (diagonal, whole, 0), (0, whole, diagonal)

    def run(query, key, value, d_out, segment_ids=None):
        def attend(*arrays):
            return stick_breaking_attention(*arrays, segment_ids=segment_ids, implementation="mosaic", **options)[0]

        if not backward:
            return attend(query, key, value)
        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(d_out)

    shapes = tuple(jax.ShapeDtypeStruct((B, T, N, width), jnp.bfloat16) for width in (H, H, Hv, Hv))
    if document:
        shapes += (jax.ShapeDtypeStruct((B, T), jnp.int32),)
    return Kernel(run, shapes, tiles=d_key_value + d_query + forward if backward else forward)


def stick_breaking_decode() -> Kernel:
    """Return a call to compile: attention in a decode step of 8 sequences, each with a cache of 32768 keys and values.

    There is one query token per sequence. The rows of a tile are the query heads that share a key head.
    """
    B, S, N, K, H = 8, 32768, 32, 8, 128
    query, cache = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, 1, N, H), (B, S, K, H)))
    return Kernel(
        lambda query, key, value: stick_breaking_attention(query, key, value, implementation="mosaic")[0],
        (query, cache, cache),
        tiles=(B * K, B * K * (S // 64 - 1), 0),  # a token does not attend to itself, so the last tile needs a mask
    )


def experts(
    *,
    T: int,
    k: int,
    D: int,
    F: int,
    E: int,
    activation: str = "swiglu",
    bias: bool = False,
    implementation: str = "mosaic",
) -> Kernel:
    """Return a call to compile: `expert_mlp` and its gradients. Each of T tokens uses k of E experts.

    D is the width of a token, F the hidden width of an expert. `bias`: whether the experts have biases. The
    numbers of loop iterations in `Kernel.tiles` assume that every expert gets the same number of tokens.
    """

    def run(x, w_in, w_out, gates, indices, d_out):
        def mlp(x, w_in, w_out, gates, b_in, b_out):
            options = dict(b_in=b_in, b_out=b_out, activation=activation, implementation=implementation)
            return expert_mlp(x, w_in, w_out, route(indices, E), gates, **options)

        biases = (w_in[:, 0], w_out[:, 0]) if bias else (None, None)
        out, vjp = jax.vjp(mlp, x, w_in, w_out, gates, *biases)
        return out, vjp(out * d_out)  # as in a model, the backward pass waits for the forward pass

    shapes = (T, D), (E, D, 2 * F), (E, F, D), (T, k), (T, k), (T, D)
    D, F = (-(-n // 64) * 64 for n in (D, F))
    per_expert = -(-T * k // E)
    rows = E * -(-per_expert // 128) * 2  # the number of tiles of 64 rows
    up, d_hidden = (rows * -(-F // 128) * (D // 64),) * 2
    down, d_x = rows * -(-D // 256) * (F // 64), rows * -(-D // 256) * 2 * (F // 64)
    depth = 2 * E * -(-per_expert // 64)
    d_w_out, d_w_in = depth * -(-F // 128) * -(-D // 256), depth * -(-D // 128) * 2 * -(-F // 256)
    d_biases = (depth * 2 * -(-F // 256), depth * -(-D // 256)) if bias else ()
    dtypes = (jnp.bfloat16,) * 4 + (jnp.int32, jnp.bfloat16)
    return Kernel(
        run,
        tuple(map(jax.ShapeDtypeStruct, shapes, dtypes)),
        tiles=(up, d_hidden, d_w_out, d_w_in, *d_biases, d_x, down),
    )


def expert_heads(
    *, T: int, k: int, D: int, F: int, E: int, dtype=jnp.bfloat16, implementation: str = "mosaic"
) -> Kernel:
    """Return a call to compile: the two linear maps of a mixture of attention heads (E experts), with gradients.

    For each of T tokens of width D, the first map computes k rows of width F, one per (token, choice) pair. The second
    map computes a row of width D from each of these rows, and sums the k rows of a token, weighted by the gates.
    """

    def run(x, w_in, w_out, gates, indices, d_out):
        def maps(x, w_in, w_out, gates):
            routing = route(indices, E)
            heads = expert_linear(x, w_in, routing, implementation=implementation)
            return expert_linear(heads, w_out, routing, gates=gates, implementation=implementation)

        out, vjp = jax.vjp(maps, x, w_in, w_out, gates)
        return out, vjp(out * d_out)

    per_expert = -(-T * k // E)
    rows, depth = E * -(-per_expert // 128) * 2, 2 * E * -(-per_expert // 64)
    # A float32 product is computed as several bfloat16 products. The counts below assume sums that are three times as
    # long (`deep`), and gradients of the weights with twice the rows and twice the columns (`wide`). In fact
    # mosaic_float32.py computes six products, so the counts of iterations are too low for float32.
    deep, wide = (3, 2) if dtype == jnp.float32 else (1, 1)
    to_pairs, to_tokens = deep * rows * -(-F // 256) * (D // 64), deep * rows * -(-D // 256) * (F // 64)
    d_weights = [depth * -(-wide * left // 128) * wide * -(-right // 256) for left, right in ((D, F), (F, D))]
    shapes = (T, D), (E, D, F), (E, F, D), (T, k), (T, k), (T, D)
    dtypes = (dtype,) * 4 + (jnp.int32, dtype)
    return Kernel(
        run,
        tuple(map(jax.ShapeDtypeStruct, shapes, dtypes)),
        tiles=(*d_weights, to_pairs, to_tokens, to_pairs, to_tokens),
    )


def experts_decode(implementation: str = "mosaic") -> Kernel:
    """Return a call to compile: `expert_mlp` in a decode step of 16 tokens, each with 8 of 40 experts.

    A tile has room for 64 rows of one expert. The numbers of loop iterations in `Kernel.tiles` assume that every
    expert has from 1 to 64 rows, and so exactly one tile.
    """
    T, k, D, F, E = 16, 8, 1536, 512, 40
    bf16 = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((T, D), (E, D, 2 * F), (E, F, D), (T, k))]
    return Kernel(
        lambda x, w_in, w_out, gates, i: expert_mlp(x, w_in, w_out, route(i, E), gates, implementation=implementation),
        (*bf16, jax.ShapeDtypeStruct((T, k), jnp.int32)),
        tiles=(E * -(-F // 128) * -(-D // 64), E * -(-D // 256) * -(-F // 64)),
    )


# The calls that absent_gpu.py compiles: shapes of the GPU benchmark, of the 3B model and of the 350M model. All calls
# include the backward pass, except softmax_mosaic, stick_breaking, stick_breaking_decode and experts_decode.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "softmax_mosaic": softmax_mosaic,
    "stick_breaking": partial(stick_breaking, N=12, H=128),
    "stick_breaking_training": partial(stick_breaking, N=12, H=128, backward=True),
    "stick_breaking_skip": partial(stick_breaking, N=12, H=128, backward=True, skip_below=-24.0),
    "stick_breaking_3b": partial(stick_breaking, N=36, H=64, backward=True),
    "stick_breaking_packed": partial(stick_breaking, N=36, H=64, backward=True, document=1024),
    "stick_breaking_packed_skip": partial(stick_breaking, N=12, H=128, backward=True, document=1024, skip_below=-24.0),
    "stick_breaking_350m": partial(stick_breaking, N=32, H=32, backward=True),
    "stick_breaking_256": partial(stick_breaking, N=8, H=256, backward=True),
    "stick_breaking_64_256": partial(stick_breaking, N=8, H=64, Hv=256, backward=True),
    "stick_breaking_256_64": partial(stick_breaking, N=8, H=256, Hv=64, backward=True),
    "stick_breaking_decode": stick_breaking_decode,
    "experts_powermoe_3b": partial(experts, T=8192, k=8, D=1536, F=512, E=40),
    "experts_8_wide": partial(experts, T=8192, k=2, D=2048, F=3072, E=8),
    "experts_64": partial(experts, T=16384, k=4, D=2560, F=1280, E=64),
    "experts_geglu": partial(experts, T=8192, k=8, D=1536, F=512, E=40, activation="geglu"),
    "experts_odd": partial(experts, T=1000, k=2, D=200, F=300, E=6, bias=True),
    "expert_heads": partial(expert_heads, T=8192, k=4, D=1024, F=256, E=16),
    "expert_heads_float32": partial(expert_heads, T=8192, k=4, D=1024, F=256, E=16, dtype=jnp.float32),
    "experts_decode": experts_decode,
}

# Every pair of H and Hv that the Mosaic kernels support, with all options that need additional registers. These calls
# show only how many registers the kernels use. Their field `tiles` is not correct.
WIDTHS: dict[str, Callable[[], Kernel]] = {
    f"{H}/{Hv}": partial(
        stick_breaking, B=1, T=256, N=1, H=H, Hv=Hv, backward=True,
        document=128, window=100, skip_below=-24.0, attend_current=True,
    )
    for H in mosaic.WIDTHS
    for Hv in mosaic.WIDTHS
}  # fmt: skip

# Calls whose use of memory is tested, each with the largest number of bytes that its temporaries may take.
MEMORY: dict[str, tuple[Callable[[], Kernel], float]] = {
    "stick_breaking": (partial(stick_breaking, T=65536, N=12, H=128, backward=True), 8 * 2**30),
    "experts_powermoe_3b": (partial(experts, T=65536, k=8, D=1536, F=512, E=40), 3e9),
}
