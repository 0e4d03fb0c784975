"""A clone to start the release's commands from, and a run to evaluate."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import Ended, tiny_run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder alone, so that nothing but `PYTHONPATH=.` can find it."""
    folder = tmp_path_factory.mktemp("ein Klon")
    shutil.copytree(REPOSITORY / "dinov2", folder / "dinov2")
    return folder


@pytest.fixture
def release_command(clone: Path) -> Callable[..., Ended]:
    """A command of the release, run as a file from the clone."""

    def command(file: str, *words: object, **environment: str) -> Ended:
        ended = subprocess.run(
            [sys.executable, "-W", "error", file, *map(str, words)],
            cwd=clone,
            env={**os.environ, "PYTHONPATH": ".", **environment},
            capture_output=True,
            encoding="cp1252",  # PYTHONIOENCODING of tests/conftest.py
            timeout=120,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return command


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests only read it."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "run")
