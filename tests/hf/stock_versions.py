"""Runs a script under an older transformers, beside this checkout and over the same torch.

Each version lies in a folder of its own, found in `DINOV2_TRANSFORMERS_VERSIONS` (a folder with one folder a version)
or installed once with pip below pytest's cache. Tests that call `run_under` are slow, and skip only where pip reaches
no index.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dinov2.file_lock import lock_file
from tests.hf.processes import REPOSITORY, run_alone

__all__ = ["OLDER_VERSIONS", "run_under"]

CACHE = REPOSITORY / ".pytest_cache" / "d"

# What each version needs in another version than the newest transformers brings; all else is installed already.
REQUIREMENTS = {
    "4.56.2": ("huggingface_hub>=0.34,<1.0", "tokenizers>=0.22,<=0.23.0"),
    "5.2.0": ("huggingface_hub>=1.3,<2.0", "tokenizers>=0.22,<=0.23.0", "httpx", "httpcore"),
}
OLDER_VERSIONS = tuple(REQUIREMENTS)

# What pip says where there is no network; any other failure is one of this module.
NO_INDEX = ("(from versions: none)", "NewConnectionError", "Max retries exceeded", "No module named pip")


def run_under(version: str, script: str, folder: Path) -> Any:
    """What `script` assigned to `result`, as `run_alone`, with that version of transformers."""
    known = f"import transformers\nassert transformers.__version__ == {version!r}, transformers.__version__\n"
    return run_alone(known + textwrap.dedent(script), folder, packages=installed(version))


def installed(version: str) -> Path:
    """The folder with that transformers in it; installed there when it is missing."""
    named = os.environ.get("DINOV2_TRANSFORMERS_VERSIONS", "")
    if named:
        folder = Path(named) / version
        assert (folder / "transformers").is_dir(), f"{folder} holds no transformers; unset DINOV2_TRANSFORMERS_VERSIONS"
        return folder
    folder = CACHE / f"transformers-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with lock_file(CACHE / f".transformers-{version}.lock"):  # test processes that run side by side install it once
        if not (folder / "transformers").is_dir():
            install(version, folder)
    return folder


def install(version: str, folder: Path) -> None:
    """Puts that transformers into `folder`, whole or not at all."""
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
    run = subprocess.run([*command, f"transformers=={version}", *REQUIREMENTS[version]], capture_output=True, text=True)
    try:
        if any(sign in run.stderr for sign in NO_INDEX):
            pytest.skip(f"transformers {version} is not installed, and pip reaches no index to install it from")
        assert run.returncode == 0, run.stderr[-4000:]
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
