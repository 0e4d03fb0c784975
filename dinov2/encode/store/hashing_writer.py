"""Files that are written from front to back, whole or not at all, with a digest of what went in."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format

from dinov2.whole_files import atomic_write

__all__ = ["FileFacts", "HashingWriter", "npy_header", "written_file"]


class FileFacts(NamedTuple):
    """Size and digest of a file, to know later whether it is still the same."""

    bytes: int
    sha256: str
    """"" where only the size is compared."""

    def match(self, file: Path) -> bool:
        """Whether the file is there and as it was."""
        try:
            if file.stat().st_size != self.bytes:
                return False
            with open(file, "rb") as stream:
                return not self.sha256 or hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


class HashingWriter:
    """A file being written, with the digest of what went in. It cannot seek, so nothing is written twice."""

    closed = False
    """For writers that check `closed`; `written_file` closes the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Append bytes, or an array as it lies in memory."""
        view = data if isinstance(data, bytes) else memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def seekable(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """For writers that close what they are given."""
        self.closed = True

    @property
    def facts(self) -> FileFacts:
        """Size and digest of what was written."""
        return FileFacts(self._bytes, self._digest.hexdigest())


@contextmanager
def written_file(path: Path) -> Iterator[HashingWriter]:
    """A writer for the bytes of `path`, which gets its name when the block ends well and they are on the disk."""
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        yield HashingWriter(file)


def npy_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file; its length does not depend on the number of rows."""
    head = io.BytesIO()
    description = npy_format.dtype_to_descr(dtype)
    npy_format.write_array_header_1_0(head, {"descr": description, "fortran_order": False, "shape": shape})
    return head.getvalue()
