"""Output folders: names of new ones, and checks of given ones."""

import os
import secrets
import time
from pathlib import Path

from dinov2.errors import ConfigError

__all__ = ["fresh_folder", "output_folder"]


def output_folder(folder: str | os.PathLike[str] | None, *, task: str) -> Path:
    """The folder that was asked for, or a `fresh_folder` when none was; it is not created.

    Raises `ConfigError` when nothing can be written there, so that no work is done for results that have no place.
    """
    # "" is the release's word for none.
    path = fresh_folder(task) if folder is None or not str(folder) else Path(folder).expanduser()
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if existing == path and not path.is_dir():
        raise ConfigError(f"the output folder {path} is a file; choose another path")
    if not existing.is_dir():
        raise ConfigError(f"the output folder {path} cannot be made, because {existing} is a file; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"nothing can be written to {existing} (Permission denied); choose another --output-dir")
    return path


def fresh_folder(task: str, *, root: Path | str = "runs") -> Path:
    """A folder `runs/<date>-<task>-<random digits>` that does not exist yet; it is not created.

    The digits keep commands apart that start in the same second, on one machine or on several with a shared disk.
    """
    return Path(root) / f"{time.strftime('%Y%m%d-%H%M%S')}-{task}-{secrets.token_hex(4)}"
