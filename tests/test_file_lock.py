"""A lock between processes and threads, which ends with whoever holds it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dinov2.file_lock import held

REPOSITORY = Path(__file__).resolve().parents[1]


def test_whoever_has_no_patience_is_told_that_another_holds_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock) as locked:
        assert locked
        with pytest.raises(BlockingIOError, match="another holds the lock"), held(lock, patience=0):
            pytest.fail("two hold one lock")
        assert lock.exists()  # it is still the first one's
    assert not lock.exists()
    with held(lock, patience=0) as locked:
        assert locked


def test_whoever_has_patience_gets_the_lock_in_the_end(tmp_path: Path) -> None:
    lock, order, waiting = tmp_path / "lock", [], threading.Event()

    def second() -> None:
        waiting.set()
        with held(lock):
            order.append("second")

    thread = threading.Thread(target=second)
    with held(lock):
        thread.start()
        waiting.wait(timeout=60)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "second"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import time\nfrom dinov2.file_lock import held\n"
    code += f"with held({str(lock)!r}):\n    print(flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(BlockingIOError), held(lock, patience=0):
        pytest.fail("two hold one lock")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock.exists()
    with held(lock, patience=0) as locked:
        assert locked
