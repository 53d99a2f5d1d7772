"""The Sparse Universal Transformer against the original encoder, and what halting promises."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, assert_close
from flax import nnx

from stickjax.models.halting import halting_step, start
from stickjax.models.sut import UniversalStack
from stickjax.sut_config import SutConfig

HERE = Path(__file__).parent


def original_encoder(name):
    """The stack with the original's weights, its inputs and what it gave; [.., B, T, D]."""
    with np.load(HERE / "oracles" / "sut" / f"{name}.npz", allow_pickle=False) as arrays:
        a = dict(arrays)
    p = {key.removeprefix("param/").removeprefix("mod."): a[key] for key in a if key.startswith("param/")}
    config = SutConfig(
        D=32, L=7, K=2, H=8, attention_experts=5, attention_k=2, F=24, E=6, k=2,
        normalize_before=name == "encoder_pre_norm",
    )  # fmt: skip
    stack = jax.tree.map(lambda x: x, UniversalStack(config, jax.random.key(0), causal=False))
    block, heads, ffn = stack.block, "self_attn.", "moe."
    weights = {
        (block.attention_router, "w_in"): p[heads + "q_proj.w_gate.0.weight"].T,
        (block.attention_router, "bias"): p[heads + "q_proj.w_gate.0.bias"],
        (block.attention_router, "router"): p[heads + "q_proj.w_gate.3.weight"].T,
        (block.attention, "expert_query"): p[heads + "q_proj.experts.w"],
        (block.attention, "expert_output"): p[heads + "q_proj.output_experts.w"],
        (block.attention, "key"): p[heads + "k_proj.weight"].T.reshape(32, 2, 8),
        (block.attention, "value"): p[heads + "v_proj.weight"].T.reshape(32, 2, 8),
        (block.attention, "relative"): p[heads + "rel_pos_emb"][..., 1:-1],  # distances of -64 and 64 are never used
        (block.attention_norm, "scale"): p["self_attn_layer_norm.weight"],
        (block.attention_norm, "bias"): p["self_attn_layer_norm.bias"],
        (block.ffn_router, "w_in"): p[ffn + "w_gate.0.weight"].T,
        (block.ffn_router, "bias"): p[ffn + "w_gate.0.bias"],
        (block.ffn_router, "router"): p[ffn + "w_gate.3.weight"].T,
        (block.ffn, "w_in"): p[ffn + "experts.w"],
        (block.ffn, "in_bias"): p[ffn + "experts.b"],
        (block.ffn, "w_out"): p[ffn + "output_experts.w"],
        (block.ffn, "out_bias"): p[ffn + "output_experts.b"],
        (block.ffn_norm, "scale"): p["final_layer_norm.weight"],
        (block.ffn_norm, "bias"): p["final_layer_norm.bias"],
        (stack.gate, "w_in"): p["_gate.0.weight"].T,
        (stack.gate, "bias"): p["_gate.0.bias"],
        (stack.gate, "w_out"): p["_gate.3.weight"].T,
    }
    for (module, leaf), value in weights.items():
        assert getattr(module, leaf).shape == value.shape, leaf
        setattr(module, leaf, nnx.Param(jnp.asarray(value)))
    return stack, jnp.asarray(a["x"].swapaxes(0, 1)), jnp.asarray(~a["pad"]), a


def each_step(stack, x, real, threshold):
    """The states after every step."""
    segments = jnp.where(real, 0, -1)

    def block(h, s, running, step):
        h, sums = stack.block(h, s, running, segments)
        return h, sums, {name: one.rows.sum().astype(jnp.int32) for name, one in sums.items()}

    def step(now, _):
        now = halting_step(now, block, stack.gate, real, threshold)
        return now, now

    return jax.jit(lambda: jax.lax.scan(step, start(x, real, block, stack.config.L), None, stack.config.L)[1])()


@pytest.mark.parametrize("name", ["encoder_post_norm", "encoder_pre_norm"])
def test_every_step_is_that_of_the_original_encoder(name):
    stack, x, real, expected = original_encoder(name)
    steps = each_step(stack, x, real, stack.config.halting_threshold)
    for i in range(7):
        hidden, state = (expected[part][i].swapaxes(0, 1)[real] for part in ("hidden", "soft_halted"))
        assert_close(steps.hidden[i][real], hidden, FORWARD["float32"], f"hidden {i}")
        assert_close(steps.state[i][real], state, FORWARD["float32"], f"state {i}")
        act = steps.act[i][real].mean()
        np.testing.assert_allclose(act, expected["act_loss"][i], rtol=1e-5, err_msg=f"act {i}")
