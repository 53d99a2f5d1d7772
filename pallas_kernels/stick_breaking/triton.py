"""Stick-breaking attention on any GPU that Triton compiles for: what the kernels take, their sizes and their calls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import cost, platform, triton_call, tuning
from . import fused
from .call import Call
from .spans import visitors

WIDEST = {2: 256, 4: 128}  # H and Hv, by the bytes of a number
LEAST = 16  # rows, keys and width of the least product of tensor cores
# With the rows and warps of tuned.json a thread has 16 scores or fewer, and its registers nearly suffice; all of them
# fit 99 KiB of shared memory.
KEYS = 32


class Plan(NamedTuple):
    """Static sizes of a call of the kernels."""

    B: int
    rows: int  # query rows of a head: T, or T * G where a group's heads are packed (decoding)
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    row_tile: int
    key_tile: int
    warps: int
    stages: int
    attend_current: bool
    window: int | None
    skip_below: float | None
    segments: bool
    per_position: int = 1  # query rows at one position
    splits: int = 1  # of the keys, each a batch entry of the spans and of the results
    out_dtype: jnp.dtype | None = None

    @property
    def scores(self) -> int:
        """Products of a query and a key within the mask, for queries at the end of the keys."""
        rows, window = self.rows // self.per_position, self.window
        scores = cost.visible_scores(rows, self.S, attend_current=self.attend_current, window=window)
        return self.B * self.N * self.per_position * scores

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.row_tile)

    @property
    def key_tiles(self) -> int:
        return -(-self.S // self.key_tile)

    @property
    def padded(self) -> int:
        return self.tiles * self.row_tile

    @property
    def constants(self) -> dict:
        """What all kernels take."""
        return dict(
            B=self.B, T=self.rows, S=self.S, N=self.N, K=self.K, H=self.H, Hv=self.Hv, R=self.row_tile,
            C=self.key_tile, Hp=_filled(self.H), Hvp=_filled(self.Hv), tiles=self.tiles,
            attend_current=self.attend_current, window=-1 if self.window is None else self.window,
            segments=self.segments, precision="tf32x3",
        )  # fmt: skip

    @property
    def together(self) -> int:
        """Heads whose keys and values share the cache."""
        heads = self.B * self.splits * self.N
        most = max(1, 16 * 2**20 // max(1, self.S * (self.H + self.Hv) * jnp.dtype(self.dtype).itemsize))
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)


def refuses(call: Call) -> str | None:
    H, Hv = call.query.shape[-1], call.value.shape[-1]
    if reason := triton_call.refuses(call.query):
        return reason
    if call.query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {call.query.dtype}"
    if max(H, Hv) > (most := WIDEST[call.query.dtype.itemsize]):
        return f"takes H and Hv of {call.query.dtype} up to {most}, not H={H}, Hv={Hv}"
    if 0 in call.query.shape or 0 in call.value.shape:
        return f"needs queries, keys and channels, got query {call.query.shape} and value {call.value.shape}"
    if call.tiles is not None and any(size < LEAST or size & (size - 1) for size in call.tiles):
        return f"takes tiles of powers of two from {LEAST} on, not {call.tiles}"
    return None


def detail(call: Call) -> str:
    if fused.is_decoding(call):
        return f"decoding, {fused.splits(call)} splits of the keys"
    plan = _plan(call)
    skip = "" if call.skip_below is None else f", skipping below 2^{call.skip_below:g}"
    return f"{plan.row_tile} x {plan.key_tile} tiles{skip}"


def attention(call: Call):
    """(out [B,T,N,Hv], log_rem [B,T,N], share of the key tiles computed [B,K])."""
    return fused.attention(KERNELS, call)


# Sizes.


def _filled(size: int) -> int:
    """The least power of two that holds so many, and that a product takes."""
    return max(LEAST, 1 << (size - 1).bit_length())


def _plan(call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
    """`decoding`: the query heads of a key head, which are packed as rows, and the splits of the keys."""
    (B, _, N, H), (K, Hv), m = call.query.shape, call.value.shape[2:], call.mask
    itemsize = call.query.dtype.itemsize
    chosen = tuning.tuned(platform.chip(), "stick_breaking_triton", bytes=itemsize, width=max(H, Hv))
    rows, warps = chosen["backward" if backward else "forward"]
    rows, keys = call.tiles or (rows, KEYS)
    stages = 3 if itemsize == 2 and triton_call.shared_memory() > 128 * 1024 else 2
    plan = Plan(
        B, m.T, m.S, N, K, H, Hv, call.query.dtype, rows, keys, warps, stages, m.attend_current, m.window,
        call.skip_below, call.where.query_segments is not None,
    )  # fmt: skip
    if decoding is None:
        return plan
    G, splits = decoding
    return plan._replace(
        rows=m.T * G, N=K, per_position=G, splits=splits, out_dtype=jnp.float32, skip_below=None,
        row_tile=_filled(m.T * G), warps=4,
    )  # fmt: skip


# Calls.


def _arrays(plan: Plan, scale, spans, offset, query_segments=None, key_segments=None):
    """The last arrays of every kernel; where there are no segments, anything in their place."""
    segments = (query_segments, key_segments) if plan.segments else (offset, offset)
    return scale.reshape(1).astype(jnp.float32), spans, offset, *segments


def _forward(plan: Plan, query, key, value, scale, *planned):
    from .triton_forward import forward

    entries, dtype = plan.B * plan.splits, plan.out_dtype or plan.dtype
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
            entries=entries, together=plan.together, per_position=plan.per_position, skip=skip,
            threshold=-plan.skip_below if skip else 0.0, **plan.constants,
        )  # fmt: skip

    run = cost.kernel("stick_breaking_forward", 2 * plan.scores * (plan.H + plan.Hv), stick_breaking_forward)
    return run(query, key, value, *_arrays(plan, scale, *planned))


def _d_query(plan: Plan, query, key, value, d_out, d_log_rem, spent, reached, scale, *planned):
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
            together=plan.together, **plan.constants,
        )  # fmt: skip

    run = cost.kernel("stick_breaking_d_query", 2 * plan.scores * (2 * plan.H + plan.Hv), stick_breaking_d_query)
    return run(query, key, value, d_out, d_log_rem, spent, reached, *_arrays(plan, scale, *planned))


def _d_key_value(plan: Plan, query, key, value, d_out, snapshots, reached, scale, spans, *planned):
    from .triton_d_key_value import d_key_value

    def stick_breaking_d_key_value(*arrays):
        return triton_call.launch(
            lambda: d_key_value, *arrays,
            out=(jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)),
            grid=(plan.B * plan.K * plan.key_tiles,), num_warps=plan.warps, num_stages=plan.stages, **plan.constants,
        )  # fmt: skip

    flops = 2 * plan.scores * (2 * plan.H + 2 * plan.Hv)
    run = cost.kernel("stick_breaking_d_key_value", flops, stick_breaking_d_key_value)
    who = visitors(spans, reached, plan.key_tiles)
    return run(query, key, value, d_out, snapshots, reached, who, *_arrays(plan, scale, spans, *planned))


KERNELS = fused.Kernels(_plan, _forward, _d_query, _d_key_value, snapshot_bytes=8)
