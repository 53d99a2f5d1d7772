"""The table in docs/reference/support.md says correctly which calls each implementation supports."""

import contextlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import EXPERTS, KERNEL_CASES, Experts, Stick
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import dispatch, explain, route, triton_call
from pallas_kernels.scatter_moe.call import ACTIVATIONS, GATED

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "support.md"
# The GPU on which each kernel set runs best. The other implementations run wherever JAX runs.
GPUS = {"mosaic": "NVIDIA H200", "triton": "NVIDIA A100"}


def attention(case: str | Stick, dtype: str = "bfloat16", **options):
    case = KERNEL_CASES[case] if isinstance(case, str) else case
    arrays = [jax.ShapeDtypeStruct(x.shape, dtype) for x in jax.eval_shape(case.arrays)]
    return "stick_breaking_attention", arrays, case.options() | options


def experts(case: str | Experts = "plain", dtype: str = "bfloat16", *, bias: bool = False, activation: str = "swiglu"):
    case = EXPERTS[case] if isinstance(case, str) else case
    T, k, E, D, F = case.T, case.k, case.E, case.D, case.F
    width = F * (2 if activation in GATED else 1)
    shapes = (T, D), (E, D, width), (E, F, D), (T, k), (E, width), (E, D)
    x, w_in, w_out, gates, b_in, b_out = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    options = dict(activation=activation) | (dict(b_in=b_in, b_out=b_out) if bias else {})
    return "expert_mlp", (x, w_in, w_out, route(case.indices(), E), gates), options


def linear(*, by_token: bool = False, gated: bool = False, **options):
    case = EXPERTS["odd"]
    shapes = (case.T if by_token else case.rows, case.D), (case.E, case.D, case.F), (case.T, case.k)
    x, weight, gates = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    options |= dict(gates=gates) if gated else {}
    return "expert_linear", (x, weight, route(case.indices(), case.E)), options


IN = dict(by_token=True), dict(), dict(grouped_in=True)
OUT = dict(gated=True), dict(), dict(grouped_out=True)
FEATURES = {
    "`stick_breaking_attention` in bfloat16, float16": [attention("plain"), attention("plain", "float16")],
    "attention in float32": [attention("plain", "float32")],
    "attention in float64": [attention("plain", "float64")],
    "H, Hv of 32, 64, 128, 256": [attention(name) for name in ("two-groups", "fp16-128", "wide-256")],
    "other H, Hv up to 128": [attention(Stick(H=H, Hv=Hv)) for H, Hv in ((8, 8), (20, 35), (80, 128))],
    "H, Hv of 256 in float32": [attention("wide-256", "float32")],
    "H, Hv above 256": [attention(Stick(H=264))],
    "grouped heads, Hv unlike H": [attention("grouped"), attention("two-groups")],
    "packed, padded": [attention("packed"), attention("padded")],
    "`window`, `attend_current`": [attention("window"), attention("current-only")],
    "`query_offset`, one for each entry": [attention("cache"), attention("offsets")],
    "decoding": [attention(Stick(T=1, S=700, B=3, N=4, K=2, H=32, offset=(699, 64, 5)))],
    "`skip_below`": [attention("plain", skip_below=-24.0)],
    "no queries, no keys": [attention(Stick(T=0, S=10, H=32)), attention(Stick(T=10, S=0, H=32))],
    "`expert_mlp` in bfloat16, float16": [experts(), experts(dtype="float16")],
    "experts in float32": [experts(dtype="float32")],
    "experts in float64": [experts(dtype="float64")],
    "biases, gates, every activation": [experts(bias=True, activation=name) for name in ACTIVATIONS],
    "any D and F": [experts("odd")],
    "experts and tokens without one another": [experts(name) for name in ("empty-experts", "some-idle", "all-idle")],
    "`expert_linear`, rows in any order": [linear(**a, **b) for a in IN for b in OUT],
}


@contextlib.contextmanager
def at_home(implementation: str):
    """Trace as if the device were the GPU of the implementation in `GPUS`; if it has none, trace for this device.

    Types of 64 bits are allowed.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        if implementation in GPUS:
            device = AbstractDevice(device_kind=GPUS[implementation], platform="gpu", num_cores=108)
            stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        yield


def refusal(implementation: str, op: str, arguments, options) -> str | None:
    """Return the reason why an implementation refuses a call of `op`, or None if it supports the call.

    The end of the reason, ", not ..." or ", got ...", is removed, because it has the sizes or types of the call.
    """
    try:
        explain(op, *arguments, **options, implementation=implementation)
    except NotImplementedError as error:
        return re.search(rf"implementation {implementation}: (.*?)(, not .*|, got .*)?; use ", str(error))[1]
    return None


def table() -> str:
    lines = ["| | " + " | ".join(reversed(dispatch.NAMES)) + " |", "|---" * (len(dispatch.NAMES) + 1) + "|"]
    for words, calls in FEATURES.items():
        cells = []
        for implementation in reversed(dispatch.NAMES):
            with at_home(implementation):
                found = {refusal(implementation, *call) for call in calls}
            refused = "; ".join(sorted(found - {None}))
            cells.append("yes" if not refused else f"no: {refused}" if None not in found else f"in part: {refused}")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_of_the_readme_is_what_the_implementations_say(monkeypatch):
    """The table in docs/reference/support.md equals the table that `table` makes from the implementations.

    If they differ after a change, run `python tests/test_support.py`: it writes the new table into the page.
    """
    monkeypatch.setattr(triton_call, "_missing", tuple)
    assert table() == written()[1].rstrip()


def written() -> tuple[str, str, str]:
    """Return docs/reference/support.md in three parts: the text before the table, the table, the text after it."""
    before, rest = PAGE.read_text().split("<!-- support -->\n")
    between, after = rest.split("<!-- end of support -->")
    return before, between, after


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_call, "_missing", tuple)
        new = table()
    before, _, after = written()
    PAGE.write_text(f"{before}<!-- support -->\n{new}\n<!-- end of support -->{after}")
