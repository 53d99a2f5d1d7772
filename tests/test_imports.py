"""Test the source files: what they may import, how long they are, and whether examples and annotations hold."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("pallas_kernels", "stickjax") for p in (ROOT / package).rglob("*.py"))
# Modules whose examples are run by other tests.
ELSEWHERE = (
    "stickjax.storage.checkpoints",
    "stickjax.training.optimizer",
    "stickjax.training.schedules",
    "stickjax.sweeps",
)
# The layer of each folder. A file may import from its own folder and from folders of lower layers.
LAYERS = {
    "pallas_kernels": 0,
    "stickjax.system": 1,
    "stickjax.config": 2,
    "stickjax.parallel": 3,
    "stickjax.data": 3,
    "stickjax.models": 4,
    "stickjax.storage": 5,
    "stickjax.evaluation": 6,
    "stickjax.training": 7,
    "stickjax.plan": 8,
    "stickjax.surgery": 9,
    "stickjax": 10,  # the commands
    "configs": 11,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder(name: str) -> str | None:
    """Return the folder in `LAYERS` that has the module `name`, or None for a module of another project.

    If several folders contain the module, the innermost one is returned.
    """
    return max((prefix for prefix in LAYERS if name == prefix or name.startswith(f"{prefix}.")), key=len, default=None)


def may_import(importer: str, imported: str) -> bool:
    own, other = folder(importer), folder(imported)
    return other is None or own == other or LAYERS[other] < LAYERS[own]


def imports(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, at its top or inside its functions."""
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
    """pyproject.toml lists every package of the repository, and each of its patterns for data files matches a file.

    The folder `configs` is installed as the package `stickjax.configs`.
    """
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in FILES}
    assert set(setuptools["packages"]) == folders | {"stickjax.configs"}
    assert setuptools["package-dir"] == {"stickjax.configs": "configs"} and (ROOT / "configs" / "tiny.py").exists()
    for package, patterns in setuptools["package-data"].items():
        assert all(any((ROOT / package.replace(".", "/")).glob(pattern)) for pattern in patterns)


def test_layers_are_told_apart():
    assert may_import("stickjax.models.moe", "stickjax.config.ModelConfig")
    assert may_import("stickjax.models.moe", "pallas_kernels.route") and may_import("stickjax.models.moe", "jax.numpy")
    assert may_import("stickjax.models.moe", "stickjax.models.router")
    assert not may_import("stickjax.config.fields", "stickjax.models.moe")
    assert not may_import("stickjax.data.corpus", "stickjax.parallel.mesh")  # neither is below the other
    assert not may_import("pallas_kernels.dispatch", "stickjax.config")
    assert not may_import("stickjax.training.loop", "stickjax.train")
    assert "pallas_kernels.dispatch" in imports(ROOT / "pallas_kernels" / "stick_breaking" / "api.py")
    assert "stickjax.config.ModelConfig" in imports(ROOT / "stickjax" / "models" / "moe.py")


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "configs").glob("*.py"))], ids=module_name)
def test_imports_go_one_way(path):
    wrong = {name for name in imports(path) if not may_import(module_name(path), name)}
    assert not wrong, f"{module_name(path)} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_private_names_stay_in_their_folder(path):
    """No file imports a private name of this repository from another folder.

    Private names of JAX and other packages are allowed, because the kernels need them.
    """
    name = module_name(path)
    wrong = {
        found
        for found in imports(path)
        if folder(found) not in (None, folder(name)) and any(part.startswith("_") for part in found.split("."))
    }
    assert not wrong, f"{name} imports {wrong}"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of `graph` that import themselves, directly or through other modules.

    `graph` maps a module to the modules that it imports.
    """

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    return sorted(name for name in graph if name in reached(name))


def test_no_file_imports_itself_through_others():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    paths = {module_name(path): path for path in FILES}
    graph = {}
    for name, path in paths.items():
        found = imports(path)
        # Importing a name from a module counts as importing the module. Importing a module does not count as importing
        # its package.
        graph[name] = {x if x in paths else x.rpartition(".")[0] for x in found} & set(paths) - {name}
    assert not circles(graph)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path):
    text, kernels = path.read_text(), "pallas_kernels" in path.parts
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (150 if kernels else 60), f"{node.name} has {lines} lines"


def test_the_package_is_a_few_rooms():
    assert len(list((ROOT / "stickjax").glob("*.py"))) <= 9
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[len(lengths) // 2] < 150


@pytest.mark.parametrize("path", [p for p in FILES if "stickjax" in p.parts], ids=module_name)
def test_families_are_asked_through_their_protocol(path):
    """Only the files of the Universal Transformers may test which family a model has, or read the field `classes`.

    The other files call the methods of the protocol Family. stickjax.models.classifier may read `classes`, too, because
    it builds the output layer of the classifiers of all families.
    """
    if "universal" in module_name(path) or module_name(path) == "stickjax.models.classifier":
        return
    asked = re.findall(
        r"family [!=]= [\"']|\.classes\b|getattr\([^)]*classes|isinstance\([^)]*(?:SutConfig|LanguageModel|PairClas)",
        path.read_text(),
    )
    assert not asked


@pytest.mark.parametrize("path", [p for p in FILES if ">>> " in p.read_text()], ids=module_name)
def test_examples(path):
    name = module_name(path)
    if name in ELSEWHERE:
        pytest.skip("another test runs the examples of this module")
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
    """Correct calls pass beartype's checks of the annotations, and a call with a wrong shape does not.

    The checks run in a new process. In the process of the tests they would replace the ops' own errors, which other
    tests check.
    """
    _python("""
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook("pallas_kernels", "beartype.beartype"):
    import pallas_kernels as pk
import jax, jax.numpy as jnp

def calls():
    q, k = jnp.ones((2, 8, 4, 8)), jnp.ones((2, 8, 2, 8))
    ids = jnp.zeros((2, 8), int)
    for offset in (3, jnp.asarray(3), jnp.asarray([3, 0]), None):
        out, rem = pk.stick_breaking_attention(
            q, k, k, segment_ids=ids, key_segment_ids=ids, query_offset=offset,
            scale=0.1, window=3, skip_below=-9.0, tiles=(4, 4),
        )
    pk.merge_stick_breaking((out, rem), (out, rem))
    scale = jnp.asarray(0.1)
    pk.stick_breaking_attention(q, k, k, scale=scale, implementation=("xla", "reference"), return_stats=True)
    x, g, w = jnp.ones((5, 8)), jnp.ones((5, 2)), jnp.ones((3, 8, 8))
    r = pk.route(jnp.zeros((5, 2), int), 3)
    pk.expert_mlp(x, w, w[:, :4], r, g, b_in=w[:, 0], b_out=w[:, 0], implementation="xla")
    y = pk.expert_linear(x, w, r, grouped_out=True)
    pk.expert_linear(y, w, r, grouped_in=True, gates=g, bias=w[:, 0])

jax.eval_shape(calls)  # the checks run while JAX traces
q = jnp.ones((2, 8, 4, 8))
pk.stick_breaking_attention(q, q, q)
try:
    pk.stick_breaking_attention(q[0], q, q)
except TypeCheckError:
    pass
else:
    raise SystemExit("the annotations are not checked")
""")
