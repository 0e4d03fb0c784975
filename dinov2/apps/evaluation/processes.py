"""An evaluation in one process or in all those that torchrun or SLURM started together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2 import distributed
from dinov2.apps.places import output_folder

__all__ = ["Say", "joined", "shared_folder"]

Say = Callable[[str], None]
"""Where a line for the user goes."""


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that were launched together; nothing happens where it is the only one.

    The group stays until the process ends, so that whoever reports afterwards knows which one speaks.
    """
    # Other variables, such as a port that a shell exports for later, do not make a process one of several.
    launched = os.environ.get("WORLD_SIZE", "1") != "1" or "SLURM_PROCID" in os.environ
    if launched and not distributed.is_enabled():
        distributed.enable()
    yield
    distributed.barrier()


def shared_folder(folder: str | os.PathLike[str] | None, *, task: str) -> Path:
    """`output_folder`, the same for all processes although each looks at its own clock."""
    return Path(distributed.broadcast_object(str(output_folder(folder, task=task))))
