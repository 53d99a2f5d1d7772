"""Checkpoints are exact, atomic and verified.

A damaged byte in any file of a checkpoint is detected, or it changes nothing in the restored state.
"""

import doctest
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stickjax.storage.checkpoints
import stickjax.system.checksums
from stickjax.storage.checkpoints import Checkpoints, DamagedCheckpoint, check_finite, named_leaves


class State(NamedTuple):
    params: dict
    opt: tuple
    key: jax.Array
    extras: dict


class Block(nnx.Module):
    def __init__(self, key):
        self.query = nnx.Param(jax.random.normal(key, (5, 4)))


def make_state(seed=0) -> State:
    key = jax.random.key(seed)
    params = {"blocks": Block(key), "norm": jnp.zeros(4), "table": jnp.ones((3, 2), jnp.bfloat16)}
    odd = {
        "steps": jnp.int32(7),
        "number": 12,
        "empty": jnp.zeros((0, 3)),
        "mask": jnp.array([True, False, True]),
        "special": jnp.array([-0.0, np.nan, np.inf, 1e-45], jnp.float32),
        "numpy": np.arange(3, dtype=np.int8),
        "keys": jax.random.split(key, 2),
    }
    return State(params, optax.adamw(1e-3).init(params), key, odd)


def bits(tree) -> dict[str, bytes]:
    def data(a):
        return jax.random.key_data(a) if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key) else a

    return {name: np.asarray(data(leaf)).tobytes() for name, leaf in named_leaves(tree).items()}


def abstract(tree):
    return jax.tree.map(lambda a: jax.eval_shape(lambda: a) if hasattr(a, "dtype") else a, tree)


def small(value: float) -> dict:
    return {"params": {"w": jnp.full((40, 3), float(value)), "b": jnp.zeros(3)}, "step": jnp.int32(value)}


def write(folder, *steps, keep=3):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"tokens": step})
    return folder / "checkpoints"


def run(code: str, *args, **env):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def test_docstring_examples():
    assert doctest.testmod(stickjax.storage.checkpoints).failed == 0


def test_round_trip_is_exact_and_quiet(tmp_path, capfd):
    state, extra = make_state(), {"tokens": 1, "iterator": {"state": b"\x00\xff", "name": "é"}, "loss": [1.5, None]}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        checkpoints.save(3, state, extra)
    restored = Checkpoints(tmp_path).restore(abstract(state))
    assert (restored.step, restored.extra) == (3, extra)
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.state.extras["number"] == 12 and type(restored.state.extras["number"]) is int
    assert restored.state.key.dtype == state.key.dtype
    assert isinstance(restored.state.params["blocks"], Block)
    assert capfd.readouterr() == ("", "")


def test_names_come_from_the_tree():
    names = list(named_leaves(make_state()))
    assert "params/blocks/query" in names and "opt/0/mu/blocks/query" in names
    with pytest.raises(ValueError, match="'a/b'"):
        named_leaves({"a/b": 1, "a": {"b": 2}})


def test_save_does_not_wait_and_donation_is_safe(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda a: -a - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 6):
            state = {f"w{i}": jnp.full((256, 512), float(step + i)) for i in range(6)}
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = advance(state)
    for step in range(1, 6):
        restored = checkpoints.restore(abstract(state), step)
        assert all((restored.state[f"w{i}"] == step + i).all() for i in range(6))


def test_numpy_leaf_may_change_after_save(tmp_path):
    leaf = np.zeros(1 << 20, np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": leaf}, {})
        leaf[:] = 1
    assert not checkpoints.restore({"a": leaf}).state["a"].any()
    with pytest.raises(TypeError, match="a is a NumPy array of float64"):
        checkpoints.save(2, {"a": np.zeros(3)}, {})
    with pytest.raises(TypeError, match="set"):
        checkpoints.save(2, {"a": leaf}, {"x": {1, 2}})


def test_keeps_the_newest(tmp_path):
    folder = write(tmp_path, 1, 2, 3, 10, 11, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "11"]
    with pytest.raises(ValueError, match="only of the steps \\[10, 11\\]"):
        Checkpoints(tmp_path).restore(abstract(small(0)), step=3)


def test_step_must_advance(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, small(5), {})
        with pytest.raises(ValueError, match="step=5 must be larger than 5"):
            checkpoints.save(5, small(5), {})


def test_prefix_reads_one_branch(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"tokens": 5})
    restored = checkpoints.restore(abstract(state.params), prefix="params")
    assert bits(restored.state) == bits(state.params) and restored.extra == {"tokens": 5}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(w=jnp.zeros((40, 4))), r"params/w is float32\[40, 4\], but float32\[40, 3\] in the checkpoint"),
        (dict(w=jnp.zeros((40, 3), jnp.bfloat16)), r"params/w is bfloat16\[40, 3\], but float32\[40, 3\] in the"),
        (dict(w2=jnp.zeros(3)), r"the state has params/w2, but the checkpoint does not \(the most .* is 'params/w'"),
        (None, "the state does not have params/b, but the checkpoint does"),
    ],
)
def test_another_config_is_the_callers_error(tmp_path, change, message):
    write(tmp_path, 1)
    state = small(1)
    state["params"] = {"w": state["params"]["w"]} if change is None else state["params"] | change
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path).restore(abstract(state))


def read_quietly(folder, tree):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return Checkpoints(folder).restore(tree), [str(w.message) for w in caught]


def test_one_flipped_byte_anywhere(tmp_path):
    folder, tree = write(tmp_path, 1, 2), abstract(small(0))
    rng = np.random.default_rng(0)
    expected = {step: (step, bits(small(step)), {"tokens": step}) for step in (1, 2)}
    files = sorted(p for p in (folder / "2").rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) >= 6
    for path in files:
        good = path.read_bytes()
        places = {0, len(good) // 2, len(good) - 1, *rng.integers(len(good), size=5)}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= int(rng.integers(1, 256))
            path.write_bytes(bad)
            (step, state, extra), messages = read_quietly(tmp_path, tree)
            assert (step, bits(state), extra) == expected[step], (path, place)
            # Some characters of the manifest have no meaning. All other bytes are covered by checksums.
            assert step == 1 or path.name == "manifest.json", (path, place)
            assert len(messages) == (step == 1) and all(f"{folder}/2:" in m for m in messages), messages
        path.write_bytes(good)


def test_missing_and_cut_files(tmp_path):
    folder, tree = write(tmp_path, 1, 2), abstract(small(0))
    backup = shutil.copytree(folder / "2", tmp_path / "backup")
    for path in [p.relative_to(backup) for p in backup.rglob("*") if p.is_file() and p.stat().st_size]:
        for cut in (None, 0, 0.5):
            target = folder / "2" / path
            data = target.read_bytes()
            target.unlink() if cut is None else target.write_bytes(data[: int(cut * len(data))])
            (step, state, _), _ = read_quietly(tmp_path, tree)
            assert bits(state) == bits(small(step)), (path, cut)
            target.write_bytes(data)
    shutil.rmtree(folder / "2" / "arrays")
    assert read_quietly(tmp_path, tree)[0].step == 1


MANIFESTS = {
    "a list": lambda manifest: [manifest],
    "arrays that are a list": lambda manifest: manifest | {"arrays": ["params/w"]},
    "rows that are numbers": lambda manifest: manifest | {"arrays": dict.fromkeys(manifest["arrays"], 1)},
    "no extra": lambda manifest: {name: part for name, part in manifest.items() if name != "extra"},
    "an extra that is a list": lambda manifest: manifest | {"extra": []},
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_of_something_else_is_damage(tmp_path, what):
    path = write(tmp_path, 1) / "1/manifest.json"
    body = json.dumps(MANIFESTS[what](json.loads(path.read_text())["manifest"]))
    path.write_text(f'{{"crc32": {zlib.crc32(body.encode())}, "manifest": {body}}}')
    with pytest.raises(DamagedCheckpoint, match="no intact checkpoint"), pytest.warns(UserWarning, match="damaged"):
        Checkpoints(tmp_path).restore(abstract(small(0)))


def test_checkpoints_that_are_a_file_are_an_error_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="Not a directory: '.*/checkpoints'"):
        Checkpoints(tmp_path).restore(abstract(small(0)))


def flip_manifest(step_folder: Path):
    path = step_folder / "manifest.json"
    path.write_text(path.read_text().replace("tokens", "tokenz"))


def test_damaged_is_passed_over_and_set_aside(tmp_path):
    folder, tree = write(tmp_path, 1, 2, 3), abstract(small(0))
    flip_manifest(folder / "3")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match="checkpoints/3: ValueError: manifest.json is damaged: its crc32 differs"):
            assert checkpoints.restore(tree).step == 2
        assert checkpoints.steps() == [1, 2, 3]
        with pytest.warns(UserWarning, match="step 3 is trained again, .*3.aside"):
            checkpoints.save(3, small(30), {})
    assert (folder / "3.aside").is_dir() and checkpoints.steps() == [1, 2, 3]
    assert checkpoints.restore(tree).state["step"] == 30


def test_newer_damaged_ones_do_not_push_out_the_good(tmp_path):
    folder, tree = write(tmp_path, 1, 5), abstract(small(0))
    flip_manifest(folder / "5")
    with pytest.warns(UserWarning), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(tree)
        checkpoints.save(2, small(2), {})
    assert checkpoints.steps() == [2] and (folder / "5.aside").is_dir()


def test_none_intact_is_an_error_that_deletes_nothing(tmp_path):
    folder, tree = write(tmp_path, 1, 2), abstract(small(0))
    flip_manifest(folder / "1")
    (folder / "2").rename(folder / "7")  # an intact checkpoint with a wrong name
    with pytest.raises(DamagedCheckpoint, match="(?s)7: .*must be 7, .* got 2.*1: .*crc32"), pytest.warns(UserWarning):
        Checkpoints(tmp_path).restore(tree)
    with pytest.raises(DamagedCheckpoint, match="1: .*crc32"):
        Checkpoints(tmp_path).restore(tree, step=1)
    assert Checkpoints(tmp_path).steps() == [1, 7]


def changed_on_the_way(monkeypatch):
    """Make the writer of checkpoints add 1 to the parameter `b` before it writes.

    The files are then intact, but they do not contain the arrays that the caller saved.
    """
    save_async = stickjax.storage.checkpoints.v1.save_async
    change = lambda folder, arrays: save_async(folder, arrays | {"params/b": arrays["params/b"] + 1})  # noqa: E731
    monkeypatch.setattr(stickjax.storage.checkpoints.v1, "save_async", change)


def test_arrays_are_compared_with_those_on_the_device(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        changed_on_the_way(monkeypatch)
        checkpoints.save(2, small(2), {})
    with pytest.raises(DamagedCheckpoint, match="params/b is damaged: its checksum differs"):
        Checkpoints(tmp_path).restore(abstract(small(0)), step=2)


@pytest.mark.parametrize("at_once", [2**28, 1])
def test_the_first_save_is_read_back(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(stickjax.storage.checkpoints, "READ_BACK_BYTES", at_once)
    folder = write(tmp_path, 1)
    changed_on_the_way(monkeypatch)
    message = "step 2 was not saved: .*params/b is damaged: its checksum differs .*; the run has checkpoints \\[1\\]"
    with pytest.raises(OSError, match=message):
        write(tmp_path, 2)
    assert [path.name for path in folder.iterdir()] == ["1"]


# Folder names that look like patterns, escapes or addresses, a name that is no valid text, and the longest name.
NAMES = (
    "lr[0.1]", "a\\b", "a*", "a?", "{a}", "a\nb", "a%20b", "a#b", "a..", "a ", "..a", "gs:", "$HOME", "~", "ü",
    "a|b", ":x:", os.fsdecode(b"\xff"), "x" * 255,
)  # fmt: skip


def test_a_run_may_lie_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for value, name in enumerate(("ab", *NAMES)):  # as patterns, `a?` and `a*` would match `ab`
        write(tmp_path / name / name[:100] / "run", value + 2)
        restored, said = read_quietly(tmp_path / name / name[:100] / "run", abstract(small(0)))
        assert (restored.step, bits(restored.state), said) == (value + 2, bits(small(value + 2)), []), name
    assert read_quietly(tmp_path / "ab/ab/run", abstract(small(0)))[0].step == 2


def test_a_run_that_cannot_lie_there_is_refused_at_once(tmp_path, monkeypatch):
    for folder, message in ((tmp_path / "[a]/run", "TMPDIR="), (tmp_path.joinpath(*["x" * 200] * 20), "3800 bytes")):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "[b]"))
        with pytest.raises(ValueError, match=message), Checkpoints(folder):
            raise AssertionError("Checkpoints must raise before this line")
    assert not list(tmp_path.iterdir())


def test_who_was_taken_over_touches_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        lock = tmp_path / "lock"
        lock.write_text(json.dumps(json.loads(lock.read_text()) | {"token": "another", "pid": 77}))
        (checkpoints.folder / "2.tmp").mkdir()  # left by the other process
        with pytest.raises(OSError, match="was taken over by process 77"):
            checkpoints.save(2, small(2), {})
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent.name in (tmp_path.name, "checkpoints")) == [
        "1", "2.tmp", "checkpoints", "lock",
    ]  # fmt: skip


def test_names_that_are_no_checkpoint_are_left_alone(tmp_path):
    folder = write(tmp_path, 1)
    for name in ("007", "٣", "notes", "5.aside"):
        (folder / name).mkdir()
    (folder / "2").write_text("a file")
    (folder / "4.tmp").write_text("a file")
    assert Checkpoints(tmp_path).steps() == [1, 2]
    (step, _, _), messages = read_quietly(tmp_path, abstract(small(0)))
    assert step == 1 and len(messages) == 1 and "checkpoints/2: NotADirectoryError" in messages[0]
    with pytest.warns(UserWarning, match="2.aside"), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, small(2), {})
        checkpoints.save(3, small(3), {})
    assert {path.name for path in folder.iterdir()} == {"007", "٣", "notes", "5.aside", "2.aside", "3"}


def test_unreadable_arrays_are_damage(tmp_path, monkeypatch):
    def load(*args):
        raise ValueError("a disk that fails now")

    write(tmp_path, 1)
    monkeypatch.setattr(stickjax.storage.checkpoints.v1, "load", load)
    with pytest.raises(DamagedCheckpoint, match="a disk that fails now"), pytest.warns(UserWarning):
        Checkpoints(tmp_path).restore(abstract(small(0)))


def test_checksum_sees_what_moves_and_what_cancels(x64):
    def checksum(a):
        return int(stickjax.system.checksums.checksum(jnp.asarray(a)))

    a = np.random.default_rng(0).normal(size=(6, 7))
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16, jnp.int64):
        b = np.asarray(jnp.asarray(8 * a, dtype))
        variants = [b, -b, b[::-1], b[:, ::-1], np.zeros_like(b)]
        assert len({checksum(v) for v in variants}) == len(variants), dtype
        for byte in range(b.nbytes):
            flipped = bytearray(b.tobytes())
            flipped[byte] ^= 0x80
            if byte % 7 == 0:
                assert checksum(np.frombuffer(flipped, b.dtype).reshape(b.shape)) != checksum(b)


def test_check_finite():
    check_finite({"w": jnp.ones(3), "n": jnp.arange(3)}, "step 4")
    with pytest.raises(ValueError, match="step 4: 2 of 3 values of layers/0/w are not finite"):
        check_finite({"layers": [{"w": jnp.array([1, np.nan, np.inf])}]}, "step 4")


FULL_DISK = """
import errno, os, resource, signal, sys
import jax, jax.numpy as jnp
from stickjax.storage.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": jnp.ones(3)}, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (300, 300))}, {})
try:
    checkpoints.close()
except OSError as error:
    assert error.errno == errno.EFBIG and "step 2 was not saved" in str(error) and "\\n" not in str(error), error
    assert os.listdir(checkpoints.folder) == ["1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    checkpoints.save(2, {"w": jnp.ones(3)}, {})  # and the same step can be tried again
    checkpoints.close()
    print("steps", checkpoints.steps())
"""


def test_failed_write_leaves_the_others(tmp_path):
    done = run(FULL_DISK, tmp_path)
    assert done.stdout == "steps [1, 2]\n" and done.stderr == "", done


@pytest.mark.parametrize("where", ["now", "background"])
def test_full_disk(tmp_path, monkeypatch, where):
    folder = write(tmp_path, 1)
    full = ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    def save_async(path, *args, **kwargs):
        Path(path).mkdir()
        if where == "now":
            raise OSError(errno.ENOSPC, "No space left on device")
        return type("Response", (), {"result": lambda self: (_ for _ in ()).throw(full)})()

    monkeypatch.setattr(stickjax.storage.checkpoints.v1, "save_async", save_async)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError, match=r"step 2 was not saved: the disk is full; .* has checkpoints \[1\]") as error:
        checkpoints.save(2, small(2), {})
        checkpoints.wait()
    assert error.value.errno == errno.ENOSPC and [p.name for p in folder.iterdir()] == ["1"]


KILLED = """
import sys
import jax.numpy as jnp
from stickjax.storage.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
for step in range(int(sys.argv[2]), 10**6):
    checkpoints.save(step, {"w": jnp.full((300, 1000), float(step))}, {"step": step})
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
    tree, first = {"w": jax.ShapeDtypeStruct((300, 1000), jnp.float32)}, 1
    for delay in (0.61, 0.77):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(first)], stdout=subprocess.PIPE)
        with process:
            for _ in range(3):  # when two more saves have begun, the first is complete on any machine
                process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        restored = Checkpoints(tmp_path).restore(tree)  # no warning: no incomplete folder has a step's name
        assert (restored.state["w"] == restored.step).all() and restored.extra == {"step": restored.step}
        assert restored.step > first
        first = restored.step + 1


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from stickjax.storage.checkpoints import Checkpoints
from stickjax.system.checksums import checksum
x = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
meshes = [jax.make_mesh((8,), "a", axis_types=(t,)) for t in (AxisType.Auto, AxisType.Explicit)]
meshes += [jax.make_mesh((4, 2), ("b", "a"), axis_types=(AxisType.Auto,) * 2)]
shardings = [NamedSharding(m, p) for m in meshes for p in (P("a"), P(None, "a"), P())]
assert len({int(checksum(jax.device_put(x, s))) for s in shardings} | {int(checksum(x))}) == 1
with Checkpoints(sys.argv[1], keep=20) as checkpoints:
    for step, s in enumerate(shardings):
        key = jax.device_put(jax.random.key(1), NamedSharding(s.mesh, P()))
        checkpoints.save(step, {"x": jax.device_put(x, s), "key": key}, {})
    for step, s in enumerate(reversed(shardings)):
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(s.mesh, P()))
        _, state, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), "key": key}, step)
        assert state["x"].sharding == s and (np.asarray(state["x"]) == x).all()
        assert state["key"] == jax.random.key(1)
print("same")
"""


def test_eight_devices(tmp_path):
    done = run(MESHES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    assert done.stdout == "same\n" and done.stderr == "", done
    state = {"x": jax.ShapeDtypeStruct((16, 24), jnp.float32), "key": jax.random.key(0)}
    assert Checkpoints(tmp_path).restore(state).state["x"][1, 0] == 24  # eight devices to one
