"""Only one process at a time writes to a run folder.

A process that runs keeps the lock; the lock of a process that has ended can be taken over.
"""

import doctest
import errno
import json
import os
import re
import threading
import time

import pytest

import stickjax.system.disk
import stickjax.system.lock
import stickjax.system.plain_path
from stickjax.system.lock import Lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("HEARTBEAT_SECONDS", 0.05), ("DEAD_AFTER_SECONDS", 0.6), ("SETTLE", 0.1)):
        monkeypatch.setattr(stickjax.system.lock, name, seconds)


@pytest.fixture
def without_flock(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(stickjax.system.lock.fcntl, "flock", flock)


@pytest.mark.parametrize("module", [stickjax.system.lock, stickjax.system.disk, stickjax.system.plain_path])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


def owner(folder, **changes) -> dict:
    """Write a lock file as another process would, but without holding its flock; return the content.

    `changes` replace entries of the content, such as pid or host.
    """
    lock = Lock(folder)
    record = lock._record | {"token": "another", "pid": 77, "host": "elsewhere"} | changes
    lock.release()
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps(record))
    return record


def taken(folder):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(ValueError) as error:
        Lock(folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_second_is_refused_and_changes_nothing(tmp_path):
    lock = Lock(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert re.search(rf"is being written by process {os.getpid()} on .* since \d{{4}}-", taken(tmp_path))
    lock.check()
    lock.release()
    assert not (tmp_path / "lock").exists()
    Lock(tmp_path).release()


def test_a_lock_that_is_released_while_another_process_takes_it_is_free(tmp_path, monkeypatch):
    flock, released = stickjax.system.lock._flock, []

    def release(file):
        if released:
            return flock(file)
        (tmp_path / "lock").unlink()  # the owner removes its lock, and closes it a moment later
        released.append(file)
        return False

    monkeypatch.setattr(stickjax.system.lock, "_flock", release)
    lock = Lock(tmp_path)
    lock.check()
    lock.release()
    assert released


def test_a_lock_that_something_else_has_written_over_is_released(tmp_path):
    lock = Lock(tmp_path)
    (tmp_path / "lock").write_text("notes")
    lock.release()
    assert (tmp_path / "lock").read_text() == "notes"  # an unknown file must not be deleted
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lock._file)


@pytest.mark.usefixtures("without_flock")
def test_the_second_is_refused_where_there_is_no_flock(tmp_path):
    lock = Lock(tmp_path)
    assert f"process {os.getpid()}" in taken(tmp_path)
    lock.release()
    owner(tmp_path, machine="this one, or another")
    Lock(tmp_path).release()  # the counter in the lock file stands still, so the owner is dead


@pytest.mark.usefixtures("without_flock")
def test_of_two_that_start_at_once_one_stays(tmp_path):
    won, lost = [], []

    def start():
        try:
            won.append(Lock(tmp_path))
        except ValueError as error:
            lost.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(lost) == 1
    won[0].release()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    owner(tmp_path)
    begun = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - begun < 0.5  # the kernel's flock says at once that the owner is dead


def test_an_owner_on_another_machine_lives_while_it_counts(tmp_path):
    record = owner(tmp_path, machine="another")
    end = threading.Event()

    def count():
        beat = 0
        while not end.wait(0.05):
            beat += 1
            (tmp_path / "lock.new").write_text(json.dumps(record | {"beat": beat}))
            (tmp_path / "lock.new").replace(tmp_path / "lock")

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(ValueError, match="process 77 on elsewhere"):
        Lock(tmp_path)
    end.set()
    thread.join()
    Lock(tmp_path).release()  # the owner is dead now
    owner(tmp_path, machine="another")
    timer = threading.Timer(0.2, (tmp_path / "lock").unlink)  # the owner ends normally while the next process waits
    timer.start()
    Lock(tmp_path).release()


@pytest.mark.parametrize("seconds", [0.05, 60])
def test_a_file_server_may_keep_the_flock_of_a_machine_that_is_gone(tmp_path, monkeypatch, seconds):
    owner(tmp_path, machine="another")
    begun, flock = time.monotonic(), stickjax.system.lock.fcntl.flock

    def late(file, how):
        if time.monotonic() - begun < 0.3:
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        flock(file, how)

    monkeypatch.setattr(stickjax.system.lock.fcntl, "flock", late)
    monkeypatch.setattr(stickjax.system.lock, "LEASE", seconds)
    monkeypatch.setattr(stickjax.system.lock, "DEAD_AFTER_SECONDS", 0.2)
    if seconds > 1:
        Lock(tmp_path).release()
    else:
        assert "process 77 on elsewhere" in taken(tmp_path)


def test_who_was_taken_over_is_told(tmp_path):
    lock = Lock(tmp_path)
    other = lock._record | {"token": "another", "pid": 77, "host": "elsewhere"}
    (tmp_path / "lock").write_text(json.dumps(other))
    time.sleep(0.2)
    with pytest.raises(OSError, match="was taken over by process 77 on elsewhere since"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / "lock").read_text()) == other


def test_a_folder_that_was_made_for_nothing_goes(tmp_path, monkeypatch):
    Lock(tmp_path / "a/b").release()
    assert not list(tmp_path.iterdir())

    def write(file, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stickjax.system.lock, "_write", write)
    with pytest.raises(OSError, match="the disk is full: '.*/a/b/lock'"):
        Lock(tmp_path / "a/b")
    assert not list(tmp_path.iterdir())


def test_what_is_no_lock_stays(tmp_path):
    (tmp_path / "lock").write_text("the key is under the mat")
    assert "is not a lock file of stickjax" in taken(tmp_path)
    assert (tmp_path / "lock").read_text() == "the key is under the mat"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not a folder: '.*/file'"):
        Lock(tmp_path / "file")
    (tmp_path / "lock").write_bytes(b"\0" * 100)  # as after a loss of power
    Lock(tmp_path).release()
