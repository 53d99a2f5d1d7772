"""Make inputs of stick-breaking attention with saturated logits, and compute the exact results.

NumPy computes the expected outputs and gradients in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import stick_breaking_attention

T, H, HUGE = 40, 32, {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30}
# The logit of each key, by name of the batch entry. Noise of standard deviation 1 is added. Attention is causal, so
# every query also has masked keys.
LOGITS = {
    **{f"{value:g}": np.full(T, value) for value in (0.0, 88.0, 1e3, 1e5, -88.0, -1e3, -1e5)},
    "far and near": np.tile([1e5, -1e5], T // 2),
    "mixture": np.tile([0, 88, -1e5, 0, 1e3, 0, 0, 1e5, -88, -1e3], T // 10),
    "a near one at times": np.where(np.arange(T) % 9 == 8, 1e5, -1),
}
PADDED = "masked and huge"  # a batch entry with logits around 0, whose padding has HUGE keys and values
NAMES = *LOGITS, PADDED
FIRST = 256.0  # the first channel of every query, so that keys for logits of 1e5 and the gradients fit into float16


def inputs(dtype):
    """Return (query, key, value), segment_ids, and the cotangents of (out, rem, log_rem), for arrays of type `dtype`.

    query, key, value and the cotangent of out are [B,T,1,H], the other cotangents [B,T,1], and segment_ids is [B,T].
    `rem` is what remains of the stick after all keys, and `log_rem` is its logarithm. Batch entry i has the logits
    LOGITS[NAMES[i]] plus noise, except the last entry, PADDED: it has logits around 0, and padding whose keys and
    values are huge.
    """
    rng, B = np.random.default_rng(0), len(NAMES)
    q, k, v, d_out = rng.standard_normal((4, B, T, 1, H))
    q, k = q / H**0.25, k / H**0.25
    q[..., 0] = FIRST
    k[..., 0, 0] = np.stack([*LOGITS.values(), np.zeros(T)]) / FIRST
    segments = np.zeros((B, T), np.int32)
    segments[-1, :7] = segments[-1, -9:] = -1
    huge = HUGE[np.dtype(dtype).name]
    k[-1, :7], k[-1, -9:], v[-1, :7], v[-1, -9:] = huge, -huge, huge, -huge
    cotangents = d_out, *rng.standard_normal((2, B, T, 1))
    arrays = tuple(x.astype(dtype) for x in (q, k, v))
    return arrays, segments, tuple(x.astype(dtype) for x in cotangents)


def expected(arrays, segments, cotangents) -> dict:
    """Return the exact outputs and gradients of `stick_breaking_attention` at scale 1, computed in float64.

    The arguments are the three results of `inputs`. The dict has the keys out, rem, log_rem, d_query, d_key and
    d_value.
    """
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in arrays)
    d_out, d_rem, d_log_rem = (np.asarray(x, np.float64)[:, :, 0] for x in cotangents)
    mask = np.tri(T, k=-1, dtype=bool) & (segments[:, :, None] >= 0) & (segments[:, None] == segments[:, :, None])
    z = np.where(mask, q @ k.swapaxes(1, 2), -np.inf)
    far, near = np.logaddexp(0, -z), np.logaddexp(0, z)  # -log of beta and of 1 - beta
    A = np.exp(-far - (np.cumsum(near[..., ::-1], -1)[..., ::-1] - near))
    rem = np.exp(-near.sum(-1))
    a = A * np.where(mask, d_out @ v.swapaxes(1, 2), 0)
    P = (d_rem * rem + d_log_rem)[..., None] + np.cumsum(a, -1) - a
    dz = np.where(mask, np.exp(-near) * a - np.exp(-far) * P, 0)
    seen = np.where(mask.any(1)[..., None], v, 0)
    return {
        "out": A @ seen, "rem": rem, "log_rem": -near.sum(-1),
        "d_query": dz @ k, "d_key": dz.swapaxes(1, 2) @ q, "d_value": A.swapaxes(1, 2) @ d_out,
    }  # fmt: skip


def results(dtype, **options) -> dict:
    """Run `stick_breaking_attention` on `inputs(dtype)`; return a dict with the keys of `expected`.

    `options` are more arguments of the call, such as `implementation`.
    """
    arrays, segments, cotangents = inputs(dtype)

    @jax.jit
    def both(arrays, cotangents):
        def function(*arrays):
            options_ = dict(scale=1.0, segment_ids=jnp.asarray(segments), return_stats=True) | options
            out, rem, stats = stick_breaking_attention(*arrays, **options_)
            return out, rem, stats.log_rem

        outputs, vjp = jax.vjp(function, *arrays)
        return outputs, vjp(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))

    outputs, gradients = both(arrays, cotangents)
    names = "out", "rem", "log_rem", "d_query", "d_key", "d_value"
    return dict(zip(names, (*outputs, *gradients), strict=True))


def errors(values: dict, dtype) -> dict[str, float]:
    """Return the relative L2 error of every array of `values` in every batch entry, compared with `expected`.

    `values` are the outputs and gradients that `results(dtype)` returns. Each key of the returned dict names an array
    and a batch entry. The error is infinite if a value is not finite.
    """
    found = {}
    for name, want in expected(*inputs(dtype)).items():
        got = np.asarray(values[name], np.float64).reshape(want.shape)
        for entry, value, right in zip(NAMES, got, want, strict=True):
            error = np.linalg.norm(value - right) / max(np.linalg.norm(right), 1e-28)  # fp32 ends at 1e-38
            found[f"{name}, logits {entry}"] = float(error) if np.isfinite(error) else float("inf")
    return found
