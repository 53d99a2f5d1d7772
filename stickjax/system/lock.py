"""A lock of a run folder: only the process that owns the lock may write into the folder.

The owner calls flock() on the file `lock` in the folder. When a process ends, even by SIGKILL, the kernel releases its
flock. The owner also writes its host, its process id and a counter into the file, and increases the counter every
HEARTBEAT_SECONDS. Another process reads the counter if flock does not show whether the owner still runs: if the owner
is on another machine or uses another mount, or if the file system has no flock. If the counter does not change for
DEAD_AFTER_SECONDS, the owner counts as dead.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from stickjax.system.disk import remove, writing

HEARTBEAT_SECONDS, DEAD_AFTER_SECONDS = 5, 20
LEASE = 180  # seconds after which a file server has released the flock of a machine that crashed
# Without flock, a process writes its record into the lock file, waits for this number of seconds, and reads the file
# again. If two processes start at the same time, only the process that wrote last finds its own record.
SETTLE = 1
NAME = "lock"
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}

log = logging.getLogger(__name__)


class Lock:
    """The lock of a folder. `Lock(folder)` takes the lock, and this process owns it until it calls `release`.

    The folder is created if it does not exist.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp() + "/run"
    >>> lock = Lock(folder)
    >>> Lock(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ... is being written by process ...
    >>> lock.release()
    >>> os.path.exists(folder)  # nothing was written there
    False

    Raises:
      ValueError: another running process owns the lock, or the file `lock` is not a lock file. Nothing was changed.
      OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._path = self.folder / NAME
        self._made: list[Path] = []
        try:
            self._make_folder()
            self._file = self._take()
        except BaseException:
            self._remove_folder()
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise OSError if another process owns the lock now. It may take the lock when this process seems dead."""
        owner = _read(self._path)
        if owner is not None and owner.get("token") != self._record["token"]:
            raise OSError(f"{self.folder} was taken over by {_name(owner)}; this process must not write there any more")

    def clear(self) -> None:
        """Delete everything in the folder except the lock file."""
        for path in self.folder.iterdir():
            if path != self._path:
                remove(path)

    def release(self, folder: Path | None = None) -> None:
        """Release the lock, and delete the lock file. Also delete the folder if this object created it and it is empty.

        If the folder was renamed while it was locked, `folder` is its new path.
        """
        self._path = (folder or self.folder) / NAME
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError, ValueError):  # keep the file if another process owns it now
            self.check()
            self._path.unlink()
        os.close(self._file)
        self._remove_folder()

    def _make_folder(self) -> None:
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                self._made.append(path)
        if not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "this is not a folder", os.fspath(self.folder))

    def _remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # a folder that is not empty remains, because rmdir raises OSError
            for path in reversed(self._made):
                path.rmdir()

    def _take(self) -> int:
        deadline = time.monotonic() + LEASE
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            has_flock = None
            try:
                machine, has_flock = f"{_kernel()}/{os.fstat(file).st_dev}", _flock(file)
                if has_flock is False:
                    owner = _read(self._path)
                    here = owner is not None and (not owner or owner.get("machine") == machine)
                    if here or time.monotonic() > deadline or (owner and self._is_alive(owner)):
                        raise self._taken()
                elif _is_at(file, self._path):
                    self._own(file, has_flock, machine)
                    return file
                os.close(file)  # try again: the owner has just removed the lock file, or the owner's machine crashed
            except BaseException:
                # On a full disk, our lock file is still empty: delete it. Never delete the file of another process.
                if has_flock is not False and os.fstat(file).st_size == 0 and _is_at(file, self._path):
                    self._path.unlink()
                os.close(file)
                raise

    def _own(self, file: int, has_flock: bool | None, machine: str) -> None:
        owner = _read(self._path)
        if owner and not (has_flock and owner.get("machine") == machine) and self._is_alive(owner):
            raise self._taken()
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._record = dict(host=socket.gethostname(), pid=os.getpid(), started=started, machine=machine)
        self._record |= dict(token=uuid.uuid4().hex, beat=0)
        with writing(self._path):
            _write(file, self._record)
        if has_flock is None:
            time.sleep(SETTLE)
            if _read(self._path) != self._record:
                raise self._taken()

    def _is_alive(self, owner: dict) -> bool:
        """Return whether the owner of the lock still runs. `owner` is the content of the lock file.

        A running owner increases the counter in the file. So this function waits up to DEAD_AFTER_SECONDS for a change
        of the file. It returns False if the owner is dead or has released the lock.
        """
        log.warning(
            "%s is locked by %s: waiting up to %s s to find out whether that process still runs",
            self.folder,
            _name(owner),
            DEAD_AFTER_SECONDS,
        )
        end = time.monotonic() + DEAD_AFTER_SECONDS
        while time.monotonic() < end:
            time.sleep(DEAD_AFTER_SECONDS / 20)
            if (now := _read(self._path)) != owner:
                return bool(now)
        return False

    def _taken(self) -> ValueError:
        for _ in range(10):  # a new owner may not have written its process id yet
            if owner := _read(self._path):
                break
            time.sleep(0.05)
        hint = "choose another folder or stop that process"
        return ValueError(f"{self.folder} is being written by {_name(owner)}; {hint}")

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, ValueError):  # the next save calls `check`, which raises the error
                self.check()
                self._record["beat"] += 1
                _write(self._file, self._record)


def _flock(file: int) -> bool | None:
    """Try to take the flock of an open file. Return True if this process now has the flock.

    Return False if another process has it, and None if the file system has no flock. `file` is the file descriptor.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _kernel() -> str:
    """Return an id of the running Linux kernel. Two processes on the same machine have the same id.

    All containers of a machine have the same id, too. A reboot changes the id.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _read(path: Path) -> dict | None:
    """Return the content of the lock file `path`: the dictionary that the owner of the lock has written.

    Return {} if the file is empty, and None if there is no file. Raise ValueError if the file is not a lock file.
    """
    try:
        content = path.read_bytes().strip(b"\0\n")  # opening the file makes NFS ask the server for new content
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        owner = None
    if not isinstance(owner, dict):
        raise ValueError(f"{path} is not a lock file of stickjax; remove it or choose another folder")
    return owner


def _write(file: int, owner: dict) -> None:
    text = json.dumps(owner).ljust(512) + "\n"  # of constant length, because it overwrites the previous text
    os.pwrite(file, text.encode(), 0)
    os.fsync(file)


def _name(owner: dict | None) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('started')}"


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A context for a block that creates the folder `path`, so that the folder is created completely or not at all.

    The context yields the path of a temporary folder, and the block writes into this folder. If the block succeeds, the
    temporary folder is renamed to `path`. If the block raises an exception, the temporary folder is deleted. Raise
    ValueError if `path` exists.
    """
    target = Path(path)
    if target.exists():
        raise ValueError(f"{path} exists; choose a new folder")
    temporary = target.with_name(f"{target.name}.tmp")
    lock, current = Lock(temporary), temporary
    try:
        lock.clear()  # files that a killed process has left
        yield temporary
        with writing(target):
            current = temporary.rename(target)
    except OSError as error:
        if error.filename is not None and Path(error.filename).is_relative_to(temporary):
            # Name the path in the target folder: the caller does not know the temporary folder.
            error.filename = os.fspath(target / Path(error.filename).relative_to(temporary))
        raise
    finally:
        if current == temporary:
            lock.clear()
        lock.release(current)
