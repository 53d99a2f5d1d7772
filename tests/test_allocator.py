"""Keeping freed memory: a command's repeated steps get no new pages, and the memory check still sees what is free."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stickjax.system import allocator
from stickjax.system.allocator import keep_freed_memory, return_freed_memory
from stickjax.system.memory import host_memory

STEPS = """
import resource, sys
from stickjax.system.allocator import keep_freed_memory
print(keep_freed_memory())
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # a temporary array of 64 MB, which is more than an arena of a thread keeps
    table = jnp.maximum(x[:, None], x)
    return (table @ x) @ (x @ table)

x = jnp.arange(4096.0)
for i in range(40):  # a step may begin before the memory of the last one is free, so the first steps need more
    if i == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
small_pages = pytest.mark.skipif(
    allocator._glibc() is None or (HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()),
    reason="needs glibc, and a kernel that gives new memory in pages of 4 KiB",
)


def run(**environment) -> list[str]:
    """Run `STEPS` in a new process. Return what it prints: whether memory is kept, and the new pages of a step."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    program = [sys.executable, "-c", STEPS]
    return subprocess.run(program, env=kept | environment, capture_output=True, text=True, check=True).stdout.split()


@small_pages
def test_steps_use_the_same_pages_again():
    kept, pages = run(JAX_PLATFORMS="cpu")
    left, pages_of_default = run(JAX_PLATFORMS="cpu", MALLOC_ARENA_MAX="8")
    assert (kept, left) == ("True", "False")
    assert int(pages_of_default) > 10_000  # 64 MB are 16,384 pages of 4 KiB
    assert int(pages) < int(pages_of_default) / 4


def test_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not keep_freed_memory()


def test_machines_with_an_accelerator_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "_DEV", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not allocator._has_accelerator()
    (tmp_path / "nvidiactl").touch()
    assert allocator._has_accelerator()
    assert not keep_freed_memory()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not allocator._has_accelerator()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not keep_freed_memory()
    return_freed_memory()
    assert host_memory() is None or host_memory().bytes > 0
