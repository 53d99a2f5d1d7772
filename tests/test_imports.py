"""The packages as files: who may import whom, what they need, their length, their examples, their annotations."""

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("pallas_kernels", "stickjax") for p in (ROOT / package).rglob("*.py"))
# Their own tests run the examples of these.
ELSEWHERE = ("stickjax.storage.checkpoints", "stickjax.training.optimizer", "stickjax.sweeps")
# A module imports from its own layer or from lower ones.
LAYERS = {
    "pallas_kernels": 0,
    "stickjax.config.fields": 1,
    "stickjax.config.decoder": 1,
    "stickjax.config.universal": 1,
    "stickjax.config": 1,
    "stickjax.config.synonyms": 1,
    "stickjax.data.tasks": 1,
    "stickjax.parallel.sharding": 1,
    "stickjax.parallel.collectives": 1,
    "stickjax.models": 2,
    "stickjax": 3,
    "configs": 4,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(name: str) -> int | None:
    """The layer of a module, None for one that is not ours."""
    found = [prefix for prefix in LAYERS if name == prefix or name.startswith(f"{prefix}.")]
    return LAYERS[max(found, key=len)] if found else None


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside its functions."""
    package = module_name(path).split(".") if path.stem == "__init__" else module_name(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # `from stickjax import models` imports stickjax.models.
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def test_what_is_installed_is_what_is_there():
    """The packages in pyproject.toml are all, and the configs, which lie inside of stickjax where it is installed."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in FILES}
    assert set(setuptools["packages"]) == folders | {"stickjax.configs"}
    assert setuptools["package-dir"] == {"stickjax.configs": "configs"} and (ROOT / "configs" / "tiny.py").exists()
    for package, patterns in setuptools["package-data"].items():
        assert all(any((ROOT / package.replace(".", "/")).glob(pattern)) for pattern in patterns)


def test_layers_are_told_apart():
    names = (
        "pallas_kernels.scatter_moe.xla",
        "stickjax.models.moe",
        "stickjax.config",
        "stickjax.train",
        "configs.tiny",
        "jax",
    )
    assert [layer(name) for name in names] == [0, 2, 1, 3, 4, None]
    assert "pallas_kernels.dispatch" in imports(ROOT / "pallas_kernels" / "stick_breaking" / "__init__.py")
    assert "stickjax.config.ModelConfig" in imports(ROOT / "stickjax" / "models" / "moe.py")


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "configs").glob("*.py"))], ids=module_name)
def test_imports_go_one_way(path):
    own = layer(module_name(path))
    wrong = {name for name in imports(path) if layer(name) is not None and layer(name) > own}
    assert not wrong, f"{module_name(path)} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", [p for p in FILES if ">>> " in p.read_text()], ids=module_name)
def test_examples(path):
    name = module_name(path)
    if name in ELSEWHERE:
        pytest.skip("its own test runs them")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def _python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_need_little():
    _python("""
import sys

BLOCKED = {"flax", "optax", "orbax", "grain", "chex", "rich", "matplotlib", "stickjax", "safetensors"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import jax.numpy as jnp, pallas_kernels.testing
x = jnp.ones((1, 4, 2, 8))
pallas_kernels.stick_breaking_attention(x, x, x)
r = pallas_kernels.route(jnp.zeros((4, 1), int), 2)
pallas_kernels.expert_mlp(x[0, :, 0], jnp.ones((2, 8, 8)), jnp.ones((2, 4, 8)), r, jnp.ones((4, 1)))
""")


def test_annotations_hold():
    """Checked at run time in a process of its own: in this one our own errors must come first."""
    _python("""
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook("pallas_kernels", "beartype.beartype"):
    import pallas_kernels as pk
import jax.numpy as jnp
q, k = jnp.ones((2, 8, 4, 8)), jnp.ones((2, 8, 2, 8))
ids = jnp.zeros((2, 8), int)
for offset in (3, jnp.asarray(3), jnp.asarray([3, 0]), None):
    out, rem = pk.stick_breaking_attention(
        q, k, k, segment_ids=ids, key_segment_ids=ids, query_offset=offset,
        scale=0.1, window=3, skip_below=-9.0, tiles=(4, 4),
    )
pk.merge_stick_breaking((out, rem), (out, rem))
pk.stick_breaking_attention(q, k, k, scale=jnp.asarray(0.1), implementation=("xla", "reference"), return_stats=True)
x, g, w = jnp.ones((5, 8)), jnp.ones((5, 2)), jnp.ones((3, 8, 8))
r = pk.route(jnp.zeros((5, 2), int), 3)
pk.expert_mlp(x, w, w[:, :4], r, g, b_in=w[:, 0], b_out=w[:, 0], implementation="xla")
y = pk.expert_linear(x, w, r, grouped_out=True)
pk.expert_linear(y, w, r, grouped_in=True, gates=g, bias=w[:, 0])
try:
    pk.stick_breaking_attention(q[0], k, k)
except TypeCheckError:
    pass
else:
    raise SystemExit("the annotations are not checked")
""")
