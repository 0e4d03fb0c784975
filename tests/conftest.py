"""What every test may rely on: real images when there are any, and a process that no launcher or cache has touched."""

import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Before torch is imported: tensors in tests are tiny, and threads that wait for each other on a busy machine cost more
# than they bring. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib: tests have no screen
# What commands in processes of their own print to: consoles are not UTF-8 everywhere.
os.environ.setdefault("PYTHONIOENCODING", "cp1252")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# Set by torchrun, SLURM or a user's shell; with them a test would believe that it is one process of many.
LAUNCHER_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Reports as UTF-8: test processes send them to each other, and names in tests need not be UTF-8."""
    report = yield
    report.sections = [(_as_utf8(title), _as_utf8(text)) for title, text in report.sections]
    if report.longrepr is not None and _as_utf8(text := str(report.longrepr)) != text:
        report.longrepr = _as_utf8(text)
    return report


def _as_utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout that these tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def vision_data() -> Path:
    """Folder with unpacked image sets, `<set>/<split>/<class>/*.jpg`; skips where `VISION_DATA` names none."""
    folder = os.environ.get("VISION_DATA", "")
    if not folder:
        pytest.skip("VISION_DATA is not set: no real images to test with")
    if not Path(folder).is_dir():
        pytest.fail(f"VISION_DATA is {folder!r}, which is no folder; unset it to skip these tests")
    return Path(folder)


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _the_same_random_numbers_whatever_ran_before() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
