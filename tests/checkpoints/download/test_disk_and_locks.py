"""A disk that is full, and several downloads at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dinov2.checkpoints import download as transfer
from dinov2.checkpoints.download import download
from dinov2.errors import DinoError
from tests.checkpoints.download.server import Server, assert_whole, names

REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_file_larger_than_the_disk_is_refused_before_it_is_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DinoError, match="is full, weights.pth does not fit; free some space and try again, or choose"):
        download(server.url(), folder=tmp_path)
    assert "weights.pth" not in names(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_what_arrived(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def write_until_full(file: object, block: bytes, real: object = transfer._write) -> None:
        if os.fstat(file.fileno()).st_size >= 300_000:
            raise OSError(code, os.strerror(code))
        real(file, block[:200_000])

    monkeypatch.setattr(transfer, "_BLOCK", 200_000)
    with monkeypatch.context() as full:
        full.setattr(transfer, "_write", write_until_full)
        with pytest.raises(DinoError, match=r"is full, .* that have arrived are kept and continued\), or choose"):
            download(server.url(), folder=tmp_path)
    size = (tmp_path / "weights.pth.partial").stat().st_size
    assert 300_000 <= size < 600_000
    assert_whole(download(server.url(), folder=tmp_path))
    assert server.requests[-1]["Range"] == f"bytes={size}-"


def test_a_disk_that_fails_at_the_end_loses_the_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(DinoError, match="is full"):
            download(server.url(), folder=tmp_path)
    assert names(tmp_path) == []
    assert_whole(download(server.url(), folder=tmp_path))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written_is_one_sentence(server: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DinoError, match="cannot be written"):
        download(server.url(), folder=tmp_path)


def test_a_folder_that_is_a_file_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DinoError, match="cannot be written"):
        download(server.url(), folder=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Several at once.


def child(url: str, folder: Path) -> "subprocess.Popen[str]":
    code = (
        f"from dinov2.checkpoints.download import download; print(download({url!r}, folder={str(folder)!r}, timeout=9))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def wait_for(condition: object, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_get_one_whole_file_between_them(server: Server, tmp_path: Path) -> None:
    server.pause = 0.02
    both = [child(server.url(), tmp_path) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == [str(tmp_path / "weights.pth")] * 2
    assert_whole(tmp_path / "weights.pth")
    assert len(server.requests) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_the_download_of_a_killed_process_is_taken_over(server: Server, tmp_path: Path) -> None:
    server.pause = 0.1
    killed = child(server.url(), tmp_path)
    part = tmp_path / "weights.pth.partial"
    wait_for(lambda: part.exists() and part.stat().st_size > 100_000)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert "weights.pth.lock" in names(tmp_path)
    server.pause = 0.0
    assert_whole(download(server.url(), folder=tmp_path))
    assert "Range" in server.requests[-1]


def test_threads_of_one_process_wait_for_each_other(server: Server, tmp_path: Path) -> None:
    server.pause = 0.01
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(download(server.url(), folder=tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [tmp_path / "weights.pth"] * 4
    assert_whole(found[0])
    assert len(server.requests) == 1


def test_a_file_system_without_locks_still_gives_a_whole_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinov2 import file_lock

    def unsupported(file: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(file_lock, "_try_lock", unsupported)
    assert_whole(download(server.url(), folder=tmp_path))
