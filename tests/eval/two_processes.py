"""Two gloo processes that do the same work on the CPU, and what each of them found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["on_two_processes"]

Work = Callable[[int, Path], dict[str, Any]]


def on_two_processes(work: Work, folder: Path) -> list[dict[str, Any]]:
    """What `work(rank, folder)`, a function of a module, returns in each process; they meet in the empty `folder`."""
    torch.multiprocessing.start_processes(_run, (work, folder), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=2)
    torch.save(work(rank, folder), folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
