"""What the C library does with freed memory."""

import os
import platform
import subprocess
import sys

import pytest

from dinov2.engine.memory import available_memory

FAULTS = """
import resource, sys, torch
from dinov2.engine.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(30):  # small blocks settle between the large ones first
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str, **environment: str) -> tuple[str, int]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, word]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=ours | environment).stdout
    kept, n_faults = output.split()
    return kept, int(n_faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_kept_and_not_cleared_again() -> None:
    _, without = faults("no")
    kept, with_it = faults("keep")
    assert kept == "True"
    assert with_it < 100 < without


def test_the_users_own_settings_of_the_allocator_stay() -> None:
    kept, _ = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"


def test_available_memory_is_a_number_of_bytes() -> None:
    free = available_memory()
    assert free is None or 2**24 < free < 2**50
