"""Number of threads of PyTorch's CPU operators: all, or one where other programs keep the cores busy.

Threads wait for each other at the end of every operator, so that one core that is taken away slows all of them down:
two threads beside other work were seen at a tenth of the speed of one.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dinov2.configs.checks import MOST_WORKERS, at_most
from dinov2.distributed import is_main_process

__all__ = ["fastest_threads", "one_thread_gain", "sample_of"]

_LOG = logging.getLogger("dinov2")
_ROUNDS = 3
_CROWDED = 2.0  # times as fast as several threads: more than small models explain
_OPERATIONS = 1e10  # of one forward pass that is timed


@contextmanager
def fastest_threads(work: Callable[[], object], *, device: torch.device, threads: int = 0) -> Iterator[None]:
    """While entered, CPU operators take `threads`; with 0 one or all, whichever does `work` faster just now.

    Says which number was taken, and warns when a given number is slower than one thread by far. The former number
    comes back afterwards. Raises `ConfigError` for more threads than any machine has.
    """
    at_most("the number of threads", threads, MOST_WORKERS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        gain = one_thread_gain(work, device)
        if not threads and gain > 1:
            torch.set_num_threads(1)
        if is_main_process() and device.type == "cpu":
            _say(before, threads, gain)
        yield
    finally:
        torch.set_num_threads(before)


def one_thread_gain(work: Callable[[], object], device: torch.device) -> float:
    """Speed of `work` with one thread, as a multiple of that with the present number; 0 without a comparison."""
    several = torch.get_num_threads()
    if several == 1 or device.type != "cpu":
        return 0.0
    seconds: dict[int, list[float]] = {1: [], several: []}
    work()  # loads code
    try:
        for _ in range(_ROUNDS):
            for number, taken in seconds.items():
                torch.set_num_threads(number)
                began = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(several)
    return statistics.median(seconds[several]) / max(statistics.median(seconds[1]), 1e-9)


def sample_of(backbone: nn.Module, *, channels: int, side: int, patch_size: int, most: int = 32) -> torch.Tensor:
    """Images `[B, channels, side, side]` of zeros on the CPU, as many as go through `backbone` in a moment."""
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    tokens = (side // patch_size) ** 2 + 1
    images = min(most, int(_OPERATIONS / max(2 * parameters * tokens, 1)))
    return torch.zeros(max(images, 1), channels, side, side)


def _say(before: int, threads: int, gain: float) -> None:
    now = torch.get_num_threads()
    if threads and gain >= _CROWDED:
        _LOG.warning(
            f"one thread is {gain:.1f} times as fast as the {threads} that were asked for: another program seems to "
            "need the same cores; leave the number of threads out, or give 1"
        )
    elif threads or before == 1:
        _LOG.info(f"computing with {now} {'thread' if now == 1 else 'threads'}")
    else:
        compared = f"{gain:.1f} times as fast as {before}" if now == 1 else f"{1 / gain:.1f} times as fast as one"
        _LOG.info(f"computing with {now} of {before} threads: measured just now, {compared}; --threads overrules")
