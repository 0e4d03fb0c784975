"""A lock between processes that ends with the process that holds it, however that ends.

The operating system keeps it (`flock`, on Windows `msvcrt.locking`), so that nobody has to judge whether a lock that
lies around is stale. Threads of one process exclude each other as well.
"""

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["held"]

_PAUSE = 0.1
# File systems without locks, such as some network drives.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def held(path: str | os.PathLike[str], *, patience: float = math.inf) -> Iterator[bool]:
    """Holds the lock `path`, waiting for it up to `patience` seconds; the file is gone afterwards.

    Gives False, and excludes nobody, on a file system that knows no locks. Raises BlockingIOError when another still
    holds it after that time.
    """
    path = Path(path)
    file, locked = _acquired(path, time.monotonic() + patience)
    try:
        yield locked
    finally:
        with suppress(OSError):  # on Windows an open file stays
            path.unlink()
        os.close(file)


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
        # Whoever held the lock before has removed its file: a lock on that one would exclude nobody.
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
