"""The implementation "triton" of stick-breaking attention: its limits, and the sizes and launches of its kernels."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from .. import cost, platform, triton_call, tuning
from . import fused, kernels
from .call import Call
from .key_ranges import query_tile_ranges

WIDEST = {2: 256, 4: 128}  # the largest H and Hv, for numbers of 2 bytes and of 4 bytes
LEAST = 16  # the smallest number of rows, keys and channels that a product on tensor cores takes
# The number of keys of a tile. tuned.json has the numbers of query rows and of warps. With these sizes, a thread has 16
# scores or fewer, so few of its registers are spilled, and all tiles fit into 99 KiB of shared memory.
KEYS = 32


@dataclass(frozen=True, kw_only=True)
class Plan(kernels.Plan):
    """The sizes of one call of a Triton attention kernel, which are constants in the compiled kernel.

    The fields here are added to the fields of `kernels.Plan`.
    """

    warps: int  # number of warps of a block
    stages: int  # number of pipeline stages of the loops of a kernel, the `num_stages` of Triton

    @property
    def constants(self) -> dict:
        """The `tl.constexpr` arguments that all three kernels take, as {name: value}."""
        return dict(
            B=self.B, T=self.rows, S=self.S, N=self.N, K=self.K, H=self.H, Hv=self.Hv, R=self.row_tile,
            C=self.key_tile, Hp=_filled(self.H), Hvp=_filled(self.Hv), tiles=self.tiles,
            attend_current=self.attend_current, window=-1 if self.window is None else self.window,
            segments=self.segments, precision="tf32x3",
        )  # fmt: skip


def refuses(call: Call) -> str | None:
    """Return the reason why the Triton kernels cannot run a call, or None if they can."""
    H, Hv = call.query.shape[-1], call.value.shape[-1]
    if reason := triton_call.refuses(call.query):
        return reason
    if call.query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {call.query.dtype}"
    if max(H, Hv) > (most := WIDEST[call.query.dtype.itemsize]):
        return f"takes H and Hv up to {most} in {call.query.dtype}, not H={H}, Hv={Hv}"
    if 0 in call.query.shape or 0 in call.value.shape:
        return f"needs queries, keys and channels, got query.shape={call.query.shape}, value.shape={call.value.shape}"
    if call.tiles is not None and any(size < LEAST or size & (size - 1) for size in call.tiles):
        return f"takes tile sizes that are powers of two from {LEAST} on, not {call.tiles}"
    return None


def detail(call: Call) -> str:
    """Describe how the kernels run a call, such as "64 x 32 tiles". `explain` shows this text.

    In decoding, the text has the number of parts into which the keys are split, in place of the sizes of the tiles.
    """
    if fused.is_decoding(call):
        return f"decoding, {fused.splits(call)} splits of the keys"
    plan = _plan(call)
    skip = "" if call.skip_below is None else f", skipping below 2^{call.skip_below:g}"
    return f"{plan.row_tile} x {plan.key_tile} tiles{skip}"


def attention(call: Call):
    """Compute stick-breaking attention with the Triton kernels. Return (out [B,T,N,Hv], log_rem [B,T,N], kept [B,K]).

    `log_rem` is the natural logarithm of the part of each query's stick that remains. `kept` is the number of key tiles
    computed, divided by the number of key tiles that the queries may see.
    """
    return fused.attention(KERNELS, call)


# Sizes.


def _filled(size: int) -> int:
    """Return the smallest power of two that is at least `size` and at least 16, the smallest size for tensor cores."""
    return max(LEAST, 1 << (size - 1).bit_length())


def _plan(call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
    """Return the `Plan` of a call for the kernel `forward`. If `backward`, it is for `d_query` and `d_key_value`.

    `decoding` is None, except in decoding. There it is a pair: the number of query heads that share a key head, and the
    number of parts into which the keys are split. The rows of these query heads form one query tile (`Plan.decoding`).
    """
    sizes, itemsize = Plan.sizes_of(call), call.query.dtype.itemsize
    width = max(sizes["H"], sizes["Hv"])
    chosen = tuning.tuned(platform.chip(), "stick_breaking_triton", bytes=itemsize, width=width)
    rows, warps = chosen["backward" if backward else "forward"]
    rows, keys = call.tiles or (rows, KEYS)
    stages = 3 if itemsize == 2 and triton_call.shared_memory() > 128 * 1024 else 2
    plan = Plan(row_tile=rows, key_tile=keys, warps=warps, stages=stages, **sizes)
    if decoding is None:
        return plan
    plan = plan.decoding(*decoding, warps=4)
    return replace(plan, row_tile=_filled(plan.rows))


# Calls.


def _arrays(plan: Plan, scale, key_ranges, offset, query_segments=None, key_segments=None):
    """Return the last arguments of every kernel: scale, key-tile ranges, offset, segment ids of queries and of keys.

    The offset [B] is the position of the first query among the keys. In a call without segments, the kernel
    does not read the segment ids, so the array of offsets is passed in their place.
    """
    segments = (query_segments, key_segments) if plan.segments else (offset, offset)
    return scale.reshape(1).astype(jnp.float32), key_ranges, offset, *segments


def _forward(plan: Plan, query, key, value, scale, *planned):
    from .triton_forward import forward

    entries, dtype = plan.entries, plan.out_dtype or plan.dtype
    skip = plan.skip_below is not None

    def stick_breaking_forward(*arrays):
        return triton_call.launch(
            lambda: forward, *arrays,
            out=(
                jax.ShapeDtypeStruct((entries, plan.rows, plan.N, plan.Hv), dtype),
                jax.ShapeDtypeStruct((2, entries, plan.N, plan.padded), jnp.float32),
                jax.ShapeDtypeStruct((entries, plan.N, plan.tiles), jnp.int32),
            ),
            grid=(entries * plan.N * plan.tiles,), num_warps=plan.warps, num_stages=plan.stages,
            entries=entries, together=plan.heads_together, per_position=plan.per_position, skip=skip,
            threshold=-plan.skip_below if skip else 0.0, **plan.constants,
        )  # fmt: skip

    run = cost.kernel("stick_breaking_forward", 2 * plan.scores * (plan.H + plan.Hv), stick_breaking_forward)
    return run(query, key, value, *_arrays(plan, scale, *planned))


def _d_query(plan: Plan, query, key, value, d_out, d_log_rem, log_decay, reached, scale, *planned):
    from .triton_d_query import d_query

    def stick_breaking_d_query(*arrays):
        return triton_call.launch(
            lambda: d_query, *arrays,
            out=(
                jax.ShapeDtypeStruct(query.shape, query.dtype),
                jax.ShapeDtypeStruct((plan.B, plan.N, plan.padded), jnp.float32),
                jax.ShapeDtypeStruct((plan.B, plan.N, plan.key_tiles, 2, plan.padded), jnp.float32),
            ),
            grid=(plan.B * plan.N * plan.tiles,), num_warps=plan.warps, num_stages=plan.stages,
            together=plan.heads_together, **plan.constants,
        )  # fmt: skip

    run = cost.kernel("stick_breaking_d_query", 2 * plan.scores * (2 * plan.H + plan.Hv), stick_breaking_d_query)
    return run(query, key, value, d_out, d_log_rem, log_decay, reached, *_arrays(plan, scale, *planned))


def _d_key_value(plan: Plan, query, key, value, d_out, snapshots, reached, scale, key_ranges, *planned):
    from .triton_d_key_value import d_key_value

    def stick_breaking_d_key_value(*arrays):
        return triton_call.launch(
            lambda: d_key_value, *arrays,
            out=(jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)),
            grid=(plan.B * plan.K * plan.key_tiles,), num_warps=plan.warps, num_stages=plan.stages, **plan.constants,
        )  # fmt: skip

    flops = 2 * plan.scores * (2 * plan.H + 2 * plan.Hv)
    run = cost.kernel("stick_breaking_d_key_value", flops, stick_breaking_d_key_value)
    query_ranges = query_tile_ranges(key_ranges, reached, plan.key_tiles)
    return run(query, key, value, d_out, snapshots, reached, query_ranges, *_arrays(plan, scale, key_ranges, *planned))


class TritonKernels(kernels.Kernels):
    """The attention kernels in Triton, with the interface `Kernels` that fused.py calls."""

    snapshot_bytes, row_multiple = 8, 1
    plan, forward = staticmethod(_plan), staticmethod(_forward)
    d_query, d_key_value = staticmethod(_d_query), staticmethod(_d_key_value)


KERNELS = TritonKernels()
