"""A lock between processes and threads, which ends with whoever holds it."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dinov2 import file_lock
from dinov2.errors import ConfigError
from dinov2.file_lock import is_held, lock_file, lock_folder

REPOSITORY = Path(__file__).resolve().parents[1]


def test_whoever_has_no_patience_is_told_that_another_holds_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock_file(lock) as locked:
        assert locked
        with pytest.raises(BlockingIOError, match="another holds the lock"), lock_file(lock, patience=0):
            pytest.fail("two hold one lock")
        assert lock.exists()  # it is still the first one's
    assert not lock.exists()
    with lock_file(lock, patience=0) as locked:
        assert locked


def test_whoever_has_patience_gets_the_lock_in_the_end(tmp_path: Path) -> None:
    lock, order, waiting = tmp_path / "lock", [], threading.Event()

    def second() -> None:
        waiting.set()
        with lock_file(lock):
            order.append("second")

    thread = threading.Thread(target=second)
    with lock_file(lock):
        thread.start()
        waiting.wait(timeout=60)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "second"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import time\nfrom dinov2.file_lock import lock_file\n"
    code += f"with lock_file({str(lock)!r}):\n    print(flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(BlockingIOError), lock_file(lock, patience=0):
        pytest.fail("two hold one lock")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock.exists()
    with lock_file(lock, patience=0) as locked:
        assert locked


def test_a_second_process_is_kept_out_of_the_folder_of_a_task(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with lock_folder(folder, "train"):
        assert is_held(folder / ".train.lock")
        with (
            pytest.raises(ConfigError, match=r"another process .*\(train\) to .*; wait until"),
            lock_folder(folder, "train"),
        ):
            pytest.fail("two in one folder")
        with lock_folder(folder, "viz"):  # another task writes other files
            pass
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    assert is_held(folder / ".train.lock") is False


def test_folders_that_a_refused_task_leaves_empty_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), lock_folder(tmp_path / "a" / "b", "train"):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []


def test_asking_for_a_lock_leaves_it_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()  # of a process that was killed
    assert is_held(lock) is False
    assert lock.exists()

    def unsupported(file: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock, "_try_lock", unsupported)
    assert is_held(lock) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_hold_the_lock_of_its_parent(tmp_path):
    ready, go = os.pipe()
    with lock_folder(tmp_path, "train"):
        child = os.fork()
        if not child:
            os.read(ready, 1)
            os._exit(0)
    try:
        with lock_folder(tmp_path, "train"):
            pass
    finally:
        os.write(go, b"x")
        os.waitpid(child, 0)
