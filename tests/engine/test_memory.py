"""What the C library does with freed memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from dinov2.engine.memory import available_memory, keep_freed_memory

FAULTS = """
import resource, torch
from dinov2.engine.memory import keep_freed_memory

def faults():
    for _ in range(30):  # small blocks settle between the large ones first
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:")) // 1024

first = faults(), resident()
with keep_freed_memory(torch.device("cpu")) as kept:
    within = faults(), resident()
print(int(kept), *first, *within, resident())
"""


def child(**environment: str) -> list[int]:
    """Whether memory was kept; page faults and resident MiB before and within; resident MiB behind."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=ours | environment).stdout
    return [int(word) for word in output.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_kept_meanwhile_and_goes_back_in_the_end() -> None:
    kept, faults_before, mib_before, faults_within, mib_within, mib_behind = child()
    assert kept == 1
    assert faults_within < 100 < faults_before
    assert mib_within - mib_before >= 64 > mib_behind - mib_before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such settings")
def test_the_users_own_settings_of_the_allocator_stay() -> None:
    kept, faults_before, _, faults_within, *_ = child(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == 0
    assert min(faults_before, faults_within) > 100


def test_nothing_is_told_for_a_gpu() -> None:
    with keep_freed_memory(torch.device("cuda")) as kept:
        assert not kept


def test_available_memory_is_a_number_of_bytes() -> None:
    free = available_memory()
    assert free is None or 2**24 < free < 2**50
