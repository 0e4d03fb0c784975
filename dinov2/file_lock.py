"""Locks between processes, which end with the process that holds them.

The operating system keeps it (`flock`, on Windows `msvcrt.locking`), so that nobody has to judge whether a lock that
lies around is stale. Threads of one process exclude each other as well.
"""

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dinov2.errors import ConfigError

__all__ = ["is_held", "lock_file", "lock_folder"]

_PAUSE = 0.1
_MOMENT = 0.3  # seconds, longer than `is_held` needs
# File systems without locks, such as some network drives.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def lock_file(path: str | os.PathLike[str], *, patience: float = math.inf) -> Iterator[bool]:
    """Holds the lock `path`, waiting for it up to `patience` seconds; the file is gone afterwards.

    Gives False, and excludes nobody, on a file system that knows no locks. Raises BlockingIOError when another still
    holds it after that time.
    """
    path = Path(path)
    file, locked = _acquired(path, time.monotonic() + patience)
    _close_in_children(file)
    try:
        yield locked
    finally:
        if file in _held_files:
            _held_files.remove(file)
            with suppress(OSError):  # on Windows an open file stays
                path.unlink()
            os.close(file)


_held_files: set[int] = set()


def _close_in_children(file: int) -> None:
    """Let no forked child, such as a loader's worker, hold a lock beyond the end of the process that took it."""
    if hasattr(os, "register_at_fork") and not hasattr(_close_in_children, "registered"):
        os.register_at_fork(after_in_child=_close_held_files)
        _close_in_children.registered = True  # type: ignore[attr-defined]
    _held_files.add(file)


def _close_held_files() -> None:
    while _held_files:
        with suppress(OSError):
            os.close(_held_files.pop())


@contextmanager
def lock_folder(folder: str | os.PathLike[str], task: str) -> Iterator[None]:
    """Keep other processes from doing `task` in `folder` during the block; the lock file is `<folder>/.<task>.lock`.

    The folder is created, and removed again when it is still empty afterwards. Raises `ConfigError` when another
    process does the same task there.
    """
    folder = Path(folder)
    created = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    with ExitStack() as lock:
        lock.callback(_remove_empty, created)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(lock_file(folder / f".{task}.lock", patience=_MOMENT))
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is writing its results ({task}) to {folder} just now; wait until it has ended, or "
                "choose another --output-dir"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"nothing can be written to {folder} ({error.strerror}); choose another --output-dir"
            ) from error
        yield


def is_held(path: str | os.PathLike[str]) -> bool | None:
    """Whether a process holds the lock `path`; None on a file system without locks. Nothing is created."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        return not _try_lock(file)
    except OSError:
        return None
    finally:
        os.close(file)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _acquired(path: Path, until: float) -> tuple[int, bool]:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not _try_lock(file):
                if time.monotonic() >= until:
                    raise BlockingIOError(errno.EAGAIN, "another holds the lock", str(path))
                time.sleep(_PAUSE)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return file, False
            os.close(file)
            raise
        except BaseException:
            os.close(file)
            raise
        # The former holder has removed its file: a lock on that one would exclude nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file, True
        os.close(file)


if os.name == "nt":

    def _try_lock(file: int) -> bool:
        import msvcrt

        os.lseek(file, 0, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

else:

    def _try_lock(file: int) -> bool:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
