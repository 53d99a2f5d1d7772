"""The lines that a training prints before it begins."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import pallas_kernels
from stickjax.config import Config
from stickjax.data.batches import TrainingData
from stickjax.models.families import family_of
from stickjax.models.layers import gates
from stickjax.parallel import mesh as sharding


def banner(config: Config, data: TrainingData, mesh: Mesh | None = None) -> str:
    """Describe a run: the model, the data, and the kernels that one device runs, with the reason for each."""
    m, d, family = config.model, config.data, family_of(config.model)
    (total, active), flops = family.parameter_counts(m), family.flops_per_token(m, d.T)
    parts = {axis: 1 for axis in sharding.AXES} if mesh is None else mesh.shape
    divided = ", ".join(f"{axis}={size}" for axis, size in parts.items() if size > 1)
    rows = [
        f"parameters {total:,} ({active:,} active, embedding left out), {flops:,.0f} FLOP per token",
        f"data {data.summary}",
        *([f"V={m.V}, more than the {data.vocab_size} ids of the text"] if m.V != data.vocab_size else []),
        f"{config.train.steps} steps of B={d.B} x T={d.T} on {math.prod(parts.values())} x "
        f"{jax.devices()[0].device_kind}{f' ({divided})' if divided else ''}",
    ]
    kernels = {"decoder": _decoder_kernels, "sut": _sut_kernels}[m.family]
    return "\n".join([*rows, *kernels(config, parts)])


def _routed(tokens: int, k: int, E: int):
    return jax.eval_shape(lambda: pallas_kernels.route(jnp.zeros((tokens, k), jnp.int32), E))


def _decoder_kernels(config: Config, parts: dict) -> list[str]:
    m, d, rows = config.model, config.data, []
    struct, options = jax.ShapeDtypeStruct, dict(implementation=m.implementation)
    B = d.B // config.train.accumulate // math.prod(parts[axis] for axis in sharding.ROW_AXES)
    tokens, N, K = B * d.T // parts["context"], m.N // parts["tensor"], m.K // parts["tensor"]
    if m.attention == "stick_breaking":
        T = d.T if parts["context"] == 1 else d.T // parts["context"] // 2
        q, k = (struct((tokens // T, T, heads, m.H), m.dtype) for heads in (N, K))
        call = dict(scale=m.scale, window=m.window, attend_current=m.attend_current, skip_below=m.skip_below)
        segments = struct((tokens // T, T), jnp.int32)
        rows.append(
            pallas_kernels.explain("stick_breaking_attention", q, k, k, segment_ids=segments, **call, **options)
        )

    if E := m.attention_experts + m.new_attention_experts:
        x, query = struct((tokens, m.D), m.dtype), struct((E, m.D, K * m.H), m.dtype)
        rows.append(pallas_kernels.explain("expert_linear", x, query, _routed(tokens, m.N // m.K, E), **options))
    if m.E:
        tokens, E, F = tokens * parts["expert"], (m.E + m.new_experts) // parts["expert"], m.F // parts["tensor"]
        shapes = (tokens, m.D), (E, m.D, gates(m) * F), (E, F, m.D)
        x, w_in, w_out = (struct(shape, m.dtype) for shape in shapes)
        weights, call = struct((tokens, m.k), jnp.float32), dict(activation=m.activation)
        rows.append(
            pallas_kernels.explain("expert_mlp", x, w_in, w_out, _routed(tokens, m.k, E), weights, **call, **options)
        )
    return rows


def _sut_kernels(config: Config, parts: dict) -> list[str]:
    m, d = config.model, config.data
    struct, options = jax.ShapeDtypeStruct, dict(implementation=m.implementation)
    B = d.B // parts["data"] * (2 if m.classes else 1)
    tokens, rows = B * d.T, []
    if m.attention == "stick_breaking":
        q, k = (struct((B, d.T, heads, m.H), m.dtype) for heads in (m.attention_k * m.K, m.K))
        segments = struct((B, d.T), jnp.int32)
        rows.append(pallas_kernels.explain("stick_breaking_attention", q, k, k, segment_ids=segments, **options))
    x, query = struct((tokens, m.D), m.dtype), struct((m.attention_experts, m.D, m.K * m.H), m.dtype)
    routing = _routed(tokens, m.attention_k, m.attention_experts)
    rows.append(pallas_kernels.explain("expert_linear", x, query, routing, **options))
    w_in, w_out = struct((m.E, m.D, m.F), m.dtype), struct((m.E, m.F, m.D), m.dtype)
    weights, call = struct((tokens, m.k), jnp.float32), dict(activation="gelu")
    return [
        *rows,
        pallas_kernels.explain("expert_mlp", x, w_in, w_out, _routed(tokens, m.k, m.E), weights, **call, **options),
    ]
