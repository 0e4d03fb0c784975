"""Free main memory, and the allocator's handling of memory that this process frees, where the system tells."""

import ctypes
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["available_memory", "free_memory", "keep_freed_memory"]

# Parameters of glibc's mallopt(3) by number. While memory is kept, it goes back to the system when 2 GiB in a row are
# free, blocks from 1 GiB on get pages of their own, and the heap grows by 64 MiB. Afterwards they have the values up to
# which glibc itself raises them, and its own step of growth.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26, _MMAP_THRESHOLD: 2**30}
_RETURNING = {_TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17, _MMAP_THRESHOLD: 2**25}


def available_memory() -> int | None:
    """Bytes of main memory that a program could take now; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that a program could take on `device` now: of the GPU, else of main memory; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[bool]:
    """While entered, on a CPU, the C library keeps what is freed for the next allocation; yields whether it does so.

    Otherwise large blocks go back to the system at once, which has to clear every page of the next one: a tenth of the
    time of a training step on a CPU (docs/benchmarks.md). It holds for the whole process, which may take a tenth more
    memory meanwhile; what is free in the end goes back. Only glibc can be told, and where its own environment variables
    say something, that stays.
    """
    library = _glibc() if device.type == "cpu" else None
    if library is None:
        yield False
        return
    kept = _set(library, _KEEPING)
    try:
        yield kept
    finally:
        _set(library, _RETURNING)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None


def _set(library: ctypes.CDLL, options: Mapping[int, int]) -> bool:
    outcomes = [library.mallopt(number, value) for number, value in options.items()]
    return all(outcomes)
