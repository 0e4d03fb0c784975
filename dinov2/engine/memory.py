"""How much main memory is free, and what becomes of memory that this process frees, where the system lets us know."""

import ctypes
import os
import platform
from pathlib import Path

__all__ = ["available_memory", "keep_freed_memory"]

# Parameters of glibc's mallopt(3) and what they are set to: memory goes back to the system when 2 GiB in a row are
# free, blocks from 1 GiB on get pages of their own, and the heap grows by 64 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEPING = ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26), (_M_MMAP_THRESHOLD, 2**30))


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


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the next allocation; whether it could be told to.

    Otherwise large blocks go back to the system at once, which has to clear every page of the next one: a tenth of the
    time of a training step on a CPU (docs/benchmarks.md). It holds for the whole process, which may then take a tenth
    more memory. Only glibc can be told; what its own environment variables say is left as it is.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(name, value) for name, value in _KEEPING)
