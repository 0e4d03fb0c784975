"""A run to evaluate and report on, and a folder to work in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import quiet_logger, tiny_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty; logging ends with the test."""
    monkeypatch.chdir(tmp_path)
    with quiet_logger():
        yield tmp_path
