"""Checkpoints: the arrays of the training state and a JSON dictionary. They are restored bit for bit, or not at all.

A run folder contains only data; nothing in it is ever executed. The checkpoint of a step is in the run folder as

    checkpoints/<step>/arrays/          arrays, written by Orbax; names are such as "params/blocks/attention/query"
    checkpoints/<step>/manifest.json    shapes, types and checksums of the arrays, the JSON dictionary,
                                        the crc32 of every file and of the manifest itself

A checkpoint is written as `<step>.tmp` and renamed when it is complete. Every file has a checksum, so that Orbax never
reads a damaged file: Orbax would print pages of errors, and would trust the sizes in the file. Every array has a
checksum too, because the values that Orbax writes might differ from the values on the device. The first checkpoint that
a `Checkpoints` object saves is read again before it is renamed. This detects a path or a file system that loses data.
"""

import contextlib
import difflib
import errno
import itertools
import json
import logging
import math
import os
import re
import shutil
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1

from stickjax.parallel import processes
from stickjax.storage.manifest import DamagedCheckpoint, decode_bytes, encode_bytes, in_short, read_manifest, read_score
from stickjax.system.checksums import checksum, crc32_of
from stickjax.system.disk import REASONS, remove, sync_folder, system_error
from stickjax.system.lock import Lock
from stickjax.system.plain_path import plain_path

READ_BACK_BYTES = 2**28  # bytes that are read at once to verify a new checkpoint; a larger array is read as a whole

# Orbax raises an error and also logs a traceback of it for every thread. The raised error is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Restored(NamedTuple):
    step: int
    state: Any
    extra: dict


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in `run_folder/checkpoints/<step>`: the `keep` newest ones, and the one with the lowest score.

    Only one training at a time may save into a run folder. So `with Checkpoints(folder)` takes the lock of the folder,
    and raises ValueError if another training has the lock. To restore a checkpoint, no lock is needed.

    >>> import tempfile
    >>> folder, state = tempfile.mkdtemp(), {"params": {"w": jnp.arange(3.0)}, "key": jax.random.key(0)}
    >>> with Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(100, state, {"tokens": 4096})
    >>> abstract = jax.eval_shape(lambda: state)
    >>> step, restored, extra = Checkpoints(folder).restore(abstract)
    >>> step, restored["params"]["w"].tolist(), extra
    (100, [0.0, 1.0, 2.0], {'tokens': 4096})
    >>> Checkpoints(folder).restore(abstract["params"], prefix="params").state["w"].tolist()
    [0.0, 1.0, 2.0]
    """

    def __init__(self, run_folder: str | os.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self.folder, self.keep = Path(run_folder).absolute() / "checkpoints", keep
        self._position: int | None = None  # the last step that this object has saved or restored
        self._lock: Lock | None = None
        self._proven = False  # whether a checkpoint of this object has been read back
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future] | None = None

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, oldest first."""
        return sorted(int(path.name) for path in _entries(self.folder) if _is_step(path.name))

    def best(self, before: int | None = None) -> int | None:
        """Return the step of the complete checkpoint with the lowest score (see `save`); None if no checkpoint has one.

        Of two checkpoints with the same score, the earlier one is the best. With `before`, only checkpoints of earlier
        steps than `before` count.
        """
        self.wait()
        return processes.shared(partial(self._best, before))

    def is_best(self, step: int, score: float) -> bool:
        """Return whether `score` is lower than the scores of all checkpoints with a step below `step`.

        A score that is not finite is never the best.
        """
        best = self.best(step)
        return processes.shared(lambda: math.isfinite(score) and (best is None or score < self._score(best)))

    def save(self, step: int, state, extra: dict, score: float | None = None) -> None:
        """Save a checkpoint. When `save` returns, `state` may be donated or changed.

        The first save of this object waits until its checkpoint is written and verified. Every later save only waits
        for the previous save; its own checkpoint is written in the background. If training was resumed from an earlier
        step, the folder may have checkpoints of `step` or later steps. They are renamed to `<step>.aside`, and never
        overwritten or deleted.

        Args:
          step: the number of training steps so far. It must be larger than the step that this object last saved or
            restored.
          state: any pytree of arrays, typed PRNG keys and numbers (stored as JAX arrays).
          extra: a dictionary of JSON values and bytes, which `restore` returns.
          score: how good the state is: lower is better. The checkpoint with the lowest score is kept in addition to the
            newest ones. None, or a number that is not finite: the checkpoint has no score.

        Raises:
          ValueError: `step` is too small, or two leaves of `state` have the same name.
          TypeError: `extra` has a value of another type, or JAX would convert a NumPy array to a type with fewer bits.
          OSError: this save or the previous one failed (errno ENOSPC: the disk is full). Older checkpoints are intact.
        """
        self.wait()
        if self._position is not None and step <= self._position:
            raise ValueError(f"step={step} must be larger than {self._position}, the step saved or restored last")
        arrays = {name: _stored(name, leaf) for name, leaf in named_leaves(state).items()}
        rows = {name: [list(a.shape), str(a.dtype), checksum(a)] for name, a in arrays.items()}
        scored = {} if score is None or not math.isfinite(score) else {"score": float(score)}
        manifest = json.dumps({"step": step, "arrays": rows, "extra": extra} | scored, default=encode_bytes)
        # Orbax refuses arrays of size 0; the manifest alone describes them.
        arrays = {name: a for name, a in arrays.items() if a.size}
        if self._lock is not None:
            self._lock.check()  # raises if another process has taken the folder over
        with self._saving(step):
            if processes.is_writer():
                self._make_room(step)
            response = v1.save_async(plain_path(self.folder) / f"{step}.tmp" / "arrays", arrays)
            if self._proven:
                self._pending = step, self._thread.submit(self._finish, step, response, manifest)
                return
            self._complete(step, response, manifest)
            self._read_back(step, arrays)
            self._commit(step)
        self._position, self._proven = step, True

    def wait(self) -> None:
        """Wait for the save that is in progress, if there is one. Raise OSError if this save failed."""
        if self._pending is not None:
            (step, done), self._pending = self._pending, None
            with self._saving(step):
                done.result()
            self._position = step

    close = wait

    def __enter__(self):
        def take():
            self._lock = Lock(self.folder.parent)

        plain_path(self.folder)
        processes.shared(take, raises=ValueError)
        return self

    def __exit__(self, *exception):
        try:
            self.close()
        finally:
            if self._lock is not None:
                self._lock = self._lock.release()

    def restore(self, abstract_state, step: int | None = None, prefix: str = "") -> Restored | None:
        """Read and verify a checkpoint, and return it as (step, state, extra). Return None if there is no checkpoint.

        If `step` is None, damaged checkpoints are skipped, but not deleted. A warning names each one and the reason.

        Args:
          abstract_state: a pytree with the structure of the saved state; its leaves are arrays or ShapeDtypeStructs. A
            restored array gets the `sharding` of its leaf, or is on the first device if the leaf has no sharding.
          step: the step of the checkpoint; None: the newest intact checkpoint.
          prefix: the name of the part of the saved state to read, such as "params". `abstract_state` must then be this
            part alone. With "", the whole state is read.

        Raises:
          ValueError: no checkpoint of `step` exists, or its arrays differ from `abstract_state` in name, shape or type.
          DamagedCheckpoint: the checkpoint of `step` is damaged; or `step` is None, and all checkpoints are damaged.
        """
        self.wait()
        steps, leaves, reasons = processes.shared(self.steps), named_leaves(abstract_state, prefix), []
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.folder}, only of the steps {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            folder = self.folder / str(candidate)
            try:
                # Process 0 alone checks the files; all processes together compute the checksums of the arrays.
                manifest = processes.shared(partial(read_manifest, folder, candidate), raises=DamagedCheckpoint)
                specs = _match(leaves, manifest["arrays"], prefix, folder)
                arrays = _read_arrays(folder, specs, manifest["arrays"])
            except DamagedCheckpoint as error:
                reasons.append(f"{folder}: {error}")
                if step is None and processes.is_writer():
                    warnings.warn(f"skipped a damaged checkpoint, {reasons[-1]}", stacklevel=2)
                continue
            self._position = candidate
            state = [_rebuild(leaf, arrays[name]) for name, leaf in leaves.items()]
            extra = json.loads(json.dumps(manifest["extra"]), object_hook=decode_bytes)
            return Restored(candidate, jax.tree.structure(abstract_state).unflatten(state), extra)
        if reasons and step is not None:
            raise DamagedCheckpoint(f"the checkpoint of step {step} is damaged; nothing was deleted\n  {reasons[0]}")
        if reasons:
            raise DamagedCheckpoint("no intact checkpoint; nothing was deleted\n  " + "\n  ".join(reasons))
        return None

    def _make_room(self, step: int) -> None:
        for path in _entries(self.folder):
            if path.suffix in (".tmp", ".deleting"):  # a process that was killed has left it
                remove(path)
            elif _is_step(path.name) and int(path.name) >= step:
                names = (f"{path.name}.aside{n or ''}" for n in itertools.count())
                aside = next(a for a in map(self.folder.joinpath, names) if not a.exists())
                warnings.warn(
                    f"step {step} is trained again, so {path} is renamed to {path.rename(aside).name}", stacklevel=3
                )
        (self.folder / f"{step}.tmp").mkdir(parents=True)

    def _complete(self, step: int, response, manifest: str) -> None:
        """Wait for Orbax (`response`). Then write the JSON text `manifest` and the file checksums to manifest.json."""
        response.result()
        path = self.folder / f"{step}.tmp" / "manifest.json"
        if not processes.is_writer():
            return
        files = {str(p.relative_to(path.parent)): crc32_of(p) for p in sorted(path.parent.rglob("*")) if p.is_file()}
        body = json.dumps(json.loads(manifest) | {"files": files})
        with path.open("w") as file:
            file.write(f'{{"crc32": {zlib.crc32(body.encode())}, "manifest": {body}}}\n')
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)

    def _read_back(self, step: int, arrays: dict[str, jax.Array]) -> None:
        """Read the new checkpoint `<step>.tmp`. Raise DamagedCheckpoint if it differs from `arrays`, {name: array}."""
        folder = self.folder / f"{step}.tmp"
        manifest = processes.shared(partial(read_manifest, folder, step), raises=DamagedCheckpoint)
        specs: dict[str, jax.ShapeDtypeStruct] = {}
        for name, array in arrays.items():
            if specs and sum(a.nbytes for a in map(arrays.get, specs)) + array.nbytes > READ_BACK_BYTES:
                _read_arrays(folder, specs, manifest["arrays"])
                specs = {}
            specs[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        _read_arrays(folder, specs, manifest["arrays"])

    def _commit(self, step: int) -> None:
        if not processes.is_writer():
            return
        (self.folder / f"{step}.tmp").rename(self.folder / str(step))
        sync_folder(self.folder)  # before an old checkpoint is deleted
        best = self._best()
        for old in (step for step in self.steps()[: -self.keep] if step != best):
            # Rename it first, so that a half-deleted folder never looks like a checkpoint.
            remove((self.folder / str(old)).rename(self.folder / f"{old}.deleting"))

    def _score(self, step: int) -> float | None:
        return read_score(self.folder / str(step))

    def _best(self, before: int | None = None) -> int | None:
        scores = {step: self._score(step) for step in self.steps() if before is None or step < before}
        scored = {step: score for step, score in scores.items() if score is not None}
        return min(scored, key=scored.get, default=None)

    def _finish(self, step: int, response, manifest: str) -> None:
        self._complete(step, response, manifest)
        self._commit(step)

    @contextlib.contextmanager
    def _saving(self, step: int):
        try:
            yield
        except Exception as error:
            if processes.is_writer():
                shutil.rmtree(self.folder / f"{step}.tmp", ignore_errors=True)
            code = system_error(error) or errno.EIO
            reason = REASONS.get(code) or in_short(error)
            message = f"the checkpoint of step {step} was not saved: {reason}; the run has checkpoints {self.steps()}"
            raise OSError(code, message, str(self.folder)) from error


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def named_leaves(tree, prefix: str = "") -> dict[str, Any]:
    """Return {name: leaf} of a pytree. A name is `prefix/path`, without the `value` that Flax adds at the end.

    >>> named_leaves({"w": 1, "layers": [2, 3]}, prefix="params")
    {'params/layers/0': 2, 'params/layers/1': 3, 'params/w': 1}
    """
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = re.sub("(^|/)value$", "", jax.tree_util.keystr(path, simple=True, separator="/"))
        name = "/".join(filter(None, (prefix, name)))
        if name in leaves:
            raise ValueError(f"two leaves of the pytree have the name {name!r}")
        leaves[name] = leaf
    return leaves


def check_finite(params, where: str) -> None:
    """Raise ValueError if a floating-point array in the pytree `params` contains a NaN or an infinity.

    The message begins with `where`, such as "step 100", and names the array.

    >>> check_finite({"w": jnp.zeros(3)}, "step 100")
    """
    if all_finite(params):
        return
    for name, leaf in named_leaves(params).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (count := int(jnp.sum(~jnp.isfinite(leaf)))):
            raise ValueError(f"{where}: {count} of {leaf.size} values of {name} are not finite")


def all_finite(params) -> bool:
    """Return True if all values of the floating-point arrays in a pytree are finite: no NaN and no infinity."""
    return bool(_all_finite([leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]))


@jax.jit
def _all_finite(arrays):
    return jnp.all(jnp.array([jnp.isfinite(array).all() for array in arrays]))


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(name: str, leaf) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    array = jnp.array(leaf)  # a copy: the caller may change a NumPy array while it is being written
    if hasattr(leaf, "dtype") and array.dtype != leaf.dtype:
        raise TypeError(f"{name} is a NumPy array of {leaf.dtype}, which JAX cannot store: convert it to {array.dtype}")
    return array


def _spec(leaf) -> jax.ShapeDtypeStruct:
    spec = jax.eval_shape(jax.random.key_data if _is_key(leaf) else jnp.asarray, leaf)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def _rebuild(leaf, array):
    if _is_key(leaf):
        found: list = []  # key_impl takes a key or a tracer, not a ShapeDtypeStruct
        jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
        return jax.random.wrap_key_data(array, impl=found[0])
    return type(leaf)(array) if isinstance(leaf, int | float) else array


def _match(leaves: dict, rows: dict, prefix: str, folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Compare the leaves of a state with a checkpoint. Return {name: ShapeDtypeStruct} of the arrays to read from it.

    `leaves` is {name: leaf}, and `rows` is {name: [shape, type, checksum]} of the arrays in the checkpoint `folder`.
    Only the arrays whose names begin with `prefix` are compared. Raise ValueError if names, shapes or types differ.
    """
    specs = {name: _spec(leaf) for name, leaf in leaves.items()}
    saved = {n for n in rows if not prefix or n == prefix or n.startswith(f"{prefix}/")}
    hint = f"; was {folder} saved with another config?"
    for name in sorted(specs.keys() ^ saved):
        ours = name in specs
        here, there = ("has", "does not") if ours else ("does not have", "does")
        other, names = ("checkpoint", saved) if ours else ("state", specs)
        similar = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        most_similar = f" (the most similar name in the {other} is {similar[0]!r})" if similar else ""
        raise ValueError(f"the state {here} {name}, but the checkpoint {there}{most_similar}{hint}")
    for name, spec in specs.items():
        shape, dtype, _ = rows[name]
        if (list(spec.shape), str(spec.dtype)) != (shape, dtype):
            raise ValueError(f"{name} is {spec.dtype}{list(spec.shape)}, but {dtype}{shape} in the checkpoint{hint}")
    return specs


def _read_arrays(folder: Path, specs: dict, rows: dict) -> dict[str, jax.Array]:
    arrays = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if not spec.size}
    context = v1.Context()
    context.pytree.loading.partial_load = True
    stored = {name: spec for name, spec in specs.items() if spec.size}
    try:
        with context:
            arrays |= v1.load(plain_path(folder.parent) / folder.name / "arrays", stored) if stored else {}
    except Exception as error:
        raise DamagedCheckpoint(f"Orbax cannot read the arrays: {in_short(error)}") from error
    for name, array in arrays.items():
        if checksum(array) != rows[name][2]:
            raise DamagedCheckpoint(f"{name} is damaged: its checksum differs from the one in manifest.json")
    return arrays
