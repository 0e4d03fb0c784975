"""Files that are whole under their own name: written under another one, synced, renamed.

Whoever opens such a file finds the old content or the new one, after a kill, a crash and a full disk as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dinov2.file_lock import held

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside `path` to write to; it becomes `path` when the block ends well, and is removed otherwise.

    Folders on the way are made. Processes and threads that write the same file take turns. What a kill leaves, hidden
    files `.<name>.tmp` and `.<name>.lock`, goes with the next writing. Raises OSError when the disk is full or refuses.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    with held(path.with_name(f".{path.name}.lock")):
        try:
            unfinished.unlink(missing_ok=True)
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            # Some writers make files that only their owner may read; a result is for whoever may read the folder.
            unfinished.chmod(mode)
            with open(unfinished, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
