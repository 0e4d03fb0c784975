"""Where results go when nobody said so."""

import time
from pathlib import Path

__all__ = ["fresh_folder"]


def fresh_folder(task: str, *, root: Path | str = "runs") -> Path:
    """A folder `runs/<date>-<task>` that does not exist yet; it is not created."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{task}"
    folder = Path(root) / stem
    number = 2
    while folder.exists():
        folder = Path(root) / f"{stem}-{number}"
        number += 1
    return folder
