"""The implementation "mosaic" of stick-breaking attention, for Hopper GPUs: its limits and the sizes of its tiles."""

from dataclasses import replace

import jax.numpy as jnp

from .. import hopper, tuning
from . import fused
from .call import Call
from .kernels import Kernels
from .mosaic_d_key_value import d_key_value
from .mosaic_d_query import d_query
from .mosaic_forward import forward
from .mosaic_tile import KEYS, ROWS, Plan

WIDTHS = (32, 64, 128, 256)  # the values of H and of Hv that the kernels take
MEMORY = 208 * 1024  # bytes of shared memory that the tiles of a block may take
COPIED_ROWS = 8  # the GPU's copy engine takes only arrays whose number of rows is a multiple of this


def refuses(call: Call) -> str | None:
    """Return the reason why the Mosaic kernels cannot run a call, or None if they can."""
    H, (S, Hv) = call.query.shape[-1], call.value.shape[1::2]
    if reason := hopper.refuses(call.query):
        return reason
    if call.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {call.query.dtype}"
    if H not in WIDTHS or Hv not in WIDTHS:
        return f"takes H and Hv of {', '.join(map(str, WIDTHS))}, not H={H}, Hv={Hv}"
    if 0 in call.query.shape or S == 0:
        return f"needs queries and keys, got query.shape={call.query.shape} and S={S}"
    if call.tiles is not None and call.tiles not in ((ROWS, KEYS), (2 * ROWS, KEYS)):
        return f"takes tiles of (64, 64) and (128, 64), not {call.tiles}"
    if call.tiles == (2 * ROWS, KEYS) and H == Hv == max(WIDTHS):
        return f"takes tiles of (64, 64) at H={H}, Hv={Hv}, not {call.tiles}, which exceed the shared memory"
    return None


def detail(call: Call) -> str:
    """Describe how the kernels run a call, such as "128 x 64 tiles". `explain` shows this text.

    In decoding, the text has the number of parts into which the keys are split, in place of the sizes of the tiles.
    """
    S = call.mask.S
    copied = f", keys and values copied, padded from S={S} to {S + -S % COPIED_ROWS} rows" if S % COPIED_ROWS else ""
    if fused.is_decoding(call):
        return f"decoding, {fused.splits(call)} splits of the keys{copied}"
    skip = "" if call.skip_below is None else f", skipping below 2^{call.skip_below:g}"
    return f"{_warpgroups(call) * ROWS} x {KEYS} tiles{skip}{copied}"


def attention(call: Call):
    """Compute stick-breaking attention with the Mosaic kernels. Return (out [B,T,N,Hv], log_rem [B,T,N], kept [B,K]).

    `log_rem` is the natural logarithm of the part of each query's stick that remains. `kept` is the number of key tiles
    computed, divided by the number of key tiles that the queries may see.
    """
    return fused.attention(KERNELS, call)


def _warpgroups(call: Call) -> int:
    """Return the number of warpgroups that compute in a block of `forward` or `d_query`. Each computes 64 query rows.

    In decoding, this number is not used. There, one warpgroup computes (`_plan`).
    """
    width = call.query.shape[-1] + call.value.shape[-1]
    rows, _ = call.tiles or tuning.tuned("sm_90", "stick_breaking", T=call.mask.T, width=width)["tiles"]
    return rows // ROWS


def _bytes(plan: Plan, rows: int) -> int:
    """Return the bytes of two arrays [rows, H] and [rows, Hv] together, such as the keys and values of a tile."""
    return rows * (plan.H + plan.Hv) * jnp.dtype(plan.dtype).itemsize


def _plan(call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
    """Return the `Plan` of a call for the kernel `forward`. If `backward`, it is for `d_query` and `d_key_value`.

    `decoding` is None, except in decoding. There it is a pair: the number of query heads that share a key head, and the
    number of parts into which the keys are split. The rows of these query heads form one query tile (`Plan.decoding`),
    and one warpgroup computes this tile.
    """
    plan = Plan(stages=2, warpgroups=_warpgroups(call), **Plan.sizes_of(call))
    if decoding is None:
        stages = (MEMORY - _bytes(plan, plan.block_rows)) // _bytes(plan, KEYS)
        return replace(plan, stages=max(2, min(3 if backward else 4, stages)))
    # The output is float32, so it cannot overwrite the queries in shared memory. At H = Hv = 256, one stage still fits.
    bytes_of_rows = ROWS * (plan.H * plan.dtype.itemsize + plan.Hv * 4)
    return plan.decoding(*decoding, warpgroups=1, stages=max(1, min(4, (MEMORY - bytes_of_rows) // _bytes(plan, KEYS))))


class MosaicKernels(Kernels):
    """The attention kernels for Hopper GPUs, with the interface `Kernels` that fused.py calls."""

    snapshot_bytes, row_multiple = 16, COPIED_ROWS
    plan, forward = staticmethod(_plan), staticmethod(forward)
    d_query, d_key_value = staticmethod(d_query), staticmethod(d_key_value)


KERNELS = MosaicKernels()
