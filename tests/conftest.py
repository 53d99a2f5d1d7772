"""Define the settings, fixtures and comparisons that all tests share.

The tolerances of the comparisons come from `pallas_kernels.testing`.
"""

import atexit
import gc
import os
import shutil
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The warpgroups of an interpreted GPU kernel run in XLA's threads and wait for each other, so XLA needs several. It has
# one thread per CPU device or core.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# All tests, all workers and all programs that tests start share one compilation cache, because compilation takes most
# of their time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="stickjax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # most programs are small and used by several files
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
import hypothesis
import jax
import numpy as np
import pytest

from pallas_kernels.testing import FORWARD, GRADIENT, relative_error
from stickjax.data.tasks import scan
from stickjax.storage.checkpoints import named_leaves
from stickjax.training import loop
from stickjax.training.metrics import read_metrics

# Tracing and lowering create millions of objects that stay alive until their test file ends. With the default
# thresholds, Python's garbage collector visits all of them again and again. That took a seventh of the time of
# tests/test_ptx_calls.py.
gc.set_threshold(100_000, 50, 100)
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)  # the same examples in every run
hypothesis.settings.load_profile("same")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

__all__ = ["FORWARD", "GRADIENT", "relative_error"]  # tests import them from here
# Tolerance for saturated logits. Logits of +-80 in fp32 have an error of 80 * 2^-24 or more, and the logarithms of the
# weights have the same error.
SATURATED = 5e-5
# Largest relative error allowed for the log1p made of multiply-adds, in fp32. The library's log1p has 2.1e-7.
LOG1P = 1.5e-7


def assert_close(value, reference, tolerance: float, name: str = "") -> None:
    error = relative_error(value, reference)
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def assert_same_state(a, b) -> None:
    """Assert that two training states are bitwise equal."""
    for (name, x), (_, y) in zip(named_leaves(a).items(), named_leaves(b).items(), strict=True):
        if name == "key":
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def wait_for_step(run, step, process) -> None:
    """Wait until a running training has written the metrics of step `step` into its run folder `run`.

    `process` is the training as a subprocess.Popen. The test fails if the process ends early, or if
    the step takes more than 120 s.
    """
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"the training has not logged step {step} within 120 s"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """Return the path of a tokenizer.json with a small byte-level BPE tokenizer of at most 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the stick is broken and the rest of the stick is left"] * 9, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def short_scan(request):
    """Leave only the training commands of SCAN that have at most 4 actions: a tree of depth 2 is enough for them.

    A test file can set another number, LONGEST. XLA takes about three seconds for each level of a tree. The test
    commands stay as they are.
    """
    whole, longest = scan.generate, getattr(request.module, "LONGEST", 4)

    def generate(split="simple", seed=0):
        parts = whole(split, seed)
        return parts._replace(train=[row for row in parts.train if len(row.actions.split()) <= longest])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "generate", generate)
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# Test files that compile with all optimisations, as users do. They measure rounding errors, or test that a resumed
# run is bitwise equal.
OPTIMISED = ("test_stick_breaking", "test_scatter_moe", "test_train")
LONG = (
    "test_train",
    "test_processes",
    "test_expert_kernels",
    "test_kernels",
    "test_sharding",
    "test_stick_breaking",
    "test_notebook",
    "test_readme",
)  # these run first: a worker that got one of these last would work alone for a long time


@pytest.hookimpl(tryfirst=True)  # before pytest deselects tests by their marks
def pytest_collection_modifyitems(items):
    """Order the test files, and mark the cases that only `make test-all` runs.

    A test file may have a dictionary EXHAUSTIVE, {name of a test: function}. The function gets the parameters of a
    case, and returns True if the case belongs to `make test-all`.
    """
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        chosen = getattr(getattr(item, "module", None), "EXHAUSTIVE", {}).get(getattr(item, "originalname", None))
        is_empty = item.get_closest_marker("skip") is not None  # a list of cases without a case has no parameters
        if chosen is not None and not is_empty and chosen(**item.callspec.params):
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compile most test files without optimisation, and drop the compiled programs after each file.

    Without optimisation most files take half the time. The files in OPTIMISED are compiled with optimisation. If
    JAX_DISABLE_MOST_OPTIMIZATIONS is set in the environment, the value of this variable decides for all files.

    The programs are dropped because each of them maps memory. Linux allows a process 65,530 mappings, which is too few
    for the programs of all files.
    """
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    quick = name not in os.environ and request.path.stem not in OPTIMISED
    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setenv(name, "1")  # for the programs that a test starts
            jax.config.update(name.lower(), True)
        yield
    if quick:
        jax.config.update(name.lower(), False)
    jax.clear_caches()
    gc.collect()


def without_check(new, monkeypatch):
    """Return a function that does the same as `new`, but without the memory check. `new` is `loop._new`.

    A training calls the memory check, `loop.check_program`, twice: first in `loop._new`, which makes the initial
    training state, and then for the training step. Some tests replace `check_program` by a function that sends a
    signal. With `without_check`, the first call does not happen, so the signal is sent once, before the training step.
    """

    def call(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "check_program", lambda *_: None)
            return new(*arguments)

    return call
