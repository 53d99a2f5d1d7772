"""docs/reference/proven.md lists the calls of the Mosaic kernels, and agrees with the tests on how each is tested."""

import json
from pathlib import Path

import pytest
import test_expert_kernels
import test_kernels
import test_lowering
import test_ptx_calls

from benchmarks.gpu_cases import CALLS, Call
from benchmarks.gpu_stages import CORRECT

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "proven.md"
HEAD = """# How the kernels were proven

No number of this page is typed by hand: `python tests/test_proven.py` writes it from the lists of the tests, and a test
compares it. Every call is checked forward and, where it has one, backward, against the reference in float32. Where the
column "executed as PTX" has shapes instead of "yes", the call was executed with these smaller arrays.

| column | what it means | command |
|---|---|---|
| interpreted | the Mosaic kernels run in an interpreter, which reports races | `make test-all`; some: `make test` |
| lowered | the call lowers for a Hopper GPU | `make test-all`; some: `make test` |
| executed as PTX | a CPU executes the PTX of the compiled kernels ([how](../design/ptx_machine.md)) | `make test-ptx` |
| on a chip | the results of a GPU agree ([how](../contributing/gpu_check.md)) | `python -m benchmarks --gpu` |

"""


def names_of(test, argument: str = "name") -> list[str]:
    """Return the values with which pytest parametrizes the argument `argument` of `test`."""
    marks = (mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == argument)
    return [value for mark in marks for value in mark.args[1]]


def interpreted() -> set[str]:
    test = test_kernels.test_outputs_and_gradients_are_those_of_the_reference
    names = {f"small {name}" for name in names_of(test) if name not in test_kernels.LACKS["mosaic"]}
    names |= {f"experts {name}" for name in names_of(test_expert_kernels.test_mlp_is_the_loop_over_experts)}
    test = test_expert_kernels.test_linear_in_every_order
    return names | {f"linear {a} to {b}" for a in names_of(test, "rows_in") for b in names_of(test, "rows_out")}


def lowered() -> set[str]:
    prefixes = {"interpreted: ": "small ", "odd: ": "odd ", "benchmark: ": ""}
    lacks = {f"interpreted: {name}" for name in test_kernels.LACKS["mosaic"]}
    cases = [*names_of(test_lowering.test_attention_that_is_chosen_for_hopper_lowers)]
    names = {new + case.removeprefix(old) for case in cases for old, new in prefixes.items()
             if case.startswith(old) and case not in lacks}  # fmt: skip
    experts = test_lowering.test_experts_that_are_chosen_for_hopper_lower
    types = {"bfloat16": "", "float32": ", float32"}
    names |= {f"experts {name}{types[t]}" for name in names_of(experts) for t in names_of(experts, "dtype")}
    return names


def executed() -> set[str]:
    names = set(names_of(test_ptx_calls.test_a_call_is_the_reference))
    return names | {name for name in interpreted() if name.startswith("small ")}  # the same test executes their PTX


def on_a_chip() -> dict[str, str]:
    """Return a dict from the name of a call to the GPU on which it gave correct results.

    The result files of the GPU benchmark contain these facts.
    """
    passed: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("nvidia-*.json")):
        found = json.loads(path.read_text())
        for row in found["rows"]:
            if row["part"] == CORRECT and row["contestant"] == "mosaic" and row["extra"].get("passed") == "yes":
                passed[row["case"]] = found["device"]
    return passed


def shapes_of(call: Call) -> str:
    return ", ".join(f"{list(x.shape)}" for x in call.shapes()[1:4])


def page() -> str:
    chips = on_a_chip()
    proofs = {"interpreted": interpreted(), "lowered": lowered(), "executed as PTX": executed()}
    lines = [f"| call | {' | '.join(proofs)} | on a chip |", "|---" * 5 + "|"]
    for name, call in CALLS.items():
        if name.removeprefix("small ") in test_kernels.LACKS["mosaic"]:
            continue  # dispatch chooses another implementation for these calls
        cells = [*("yes" if name in names else "" for names in proofs.values()), chips.get(name, "not yet")]
        if name in test_ptx_calls.SMALLER:
            cells[2] = shapes_of(test_ptx_calls.CALLS[name])
        lines.append(f"| {name}: {call.dtype} {shapes_of(call)} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


def test_the_page_is_what_the_tests_run():
    """docs/reference/proven.md equals the page that this file computes from the cases of the tests.

    After a change, `python tests/test_proven.py` writes the page again.
    """
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", ["plain", "H=256", "decode", "odd T=131", "experts two-tiles", "linear token to pair"])
def test_every_kind_of_call_is_executed(name):
    assert name in executed()


def test_every_call_is_lowered_or_executed():
    """Every call that Mosaic supports is executed as PTX. For this, the call is lowered and compiled first."""
    lacks = {f"small {name}" for name in test_kernels.LACKS["mosaic"]}
    assert set(CALLS) - lacks <= executed()


if __name__ == "__main__":
    PAGE.write_text(page())
