"""How long a piece of work takes, and how much memory it needs at its height."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.engine.progress import peak_memory

__all__ = ["Cost", "measured_cost"]


@dataclass
class Cost:
    """Filled in when the work is done."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    """Most memory at a time: of the accelerator's tensors, or of this whole process; None where nothing tells."""


@contextmanager
def measured_cost(device: torch.device) -> Iterator[Cost]:
    """Measures the block; on a GPU its memory counts, elsewhere that of the process."""
    cost = Cost()
    begins_anew = device.type == "cuda"
    if begins_anew:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins anew
            begins_anew = True
    started = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - started
    cost.peak_bytes = peak_memory(device) if begins_anew else None
