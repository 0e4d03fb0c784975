"""Progress of a training: images per second, share of the time spent waiting for data, memory, time to go.

On a terminal one live line, elsewhere a plain log line every few seconds. All rates are averages over the last steps of
this process, so a resumed run estimates its end from what it did itself. Reading a loss waits for the device, so the
loss is handed in only where it is known anyway, at the logging steps.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as LiveProgress

from dinov2.distributed import get_global_size, is_main_process

__all__ = ["Progress", "ProgressFigures", "peak_memory"]

_WINDOW = 20  # steps; the release's window for the times in its metrics
_FIRST_STEPS = 5  # after which the duration is told
_COLLAPSE = 5  # times slower than before, the waiting for data left out: more than other crops or a warm CPU explain
_CROWDED = 2  # times as fast with one thread: more than small models explain
_LOG = logging.getLogger("dinov2")


class ProgressFigures(NamedTuple):
    """The state of a training at one moment. Rates are None before the first step."""

    step: int
    total: int
    loss: float | None
    iter_time: float | None  # seconds, mean over the last steps
    data_time: float | None  # seconds of it spent waiting for data
    images_per_second: float | None  # over all processes
    memory: int | None  # bytes, peak of this process
    seconds_to_go: float | None

    @property
    def waiting_share(self) -> float | None:
        """Part of the time spent waiting for data, 0 to 1."""
        return self.data_time / self.iter_time if self.iter_time and self.data_time is not None else None

    def __str__(self) -> str:
        parts = [
            f"loss {self.loss:.4f}" if self.loss is not None else "",
            f"{self.images_per_second:.{0 if self.images_per_second >= 10 else 2}f} images/s"
            if self.images_per_second is not None
            else "",
            f"waiting for data {self.waiting_share:.0%}" if self.waiting_share is not None else "",
            f"{self.memory / 2**30:.2f} GiB" if self.memory is not None else "",
            f"{_duration(self.seconds_to_go)} to go" if self.seconds_to_go is not None else "",
        ]
        return ", ".join(part for part in parts if part)


class Progress:
    """Follows the steps `start` to `total` of a training; a context manager around the loop.

    Per step the loop calls `step`; where it logs, it calls `show` with the loss. Only the main process shows anything.
    `line_every` is the least number of seconds between two log lines where there is no terminal. `one_thread_gain` says
    how many times as fast one thread is at the moment; it is called once, after the first full window of steps.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        label: str = "training",
        device: torch.device | None = None,
        console: Console | None = None,
        line_every: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
        one_thread_gain: Callable[[], float] | None = None,
    ) -> None:
        self.total = total
        self.done = start
        self.label = label
        self._device = device
        self._console = console
        self._line_every = line_every
        self._clock = clock
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=_WINDOW)  # seconds, seconds waiting, images
        self._loss: float | None = None
        self._mark = clock()
        self._last_line: float | None = None
        self._line_of: int | None = None  # the step that the last line was about
        self._live: LiveProgress | None = None
        self._task = TaskID(0)
        self._fastest = 0.0  # images per second of computing, the waiting for data left out
        self._one_thread_gain = one_thread_gain
        self._warned = False
        self._duration_told = False

    def __enter__(self) -> "Progress":
        self._mark = self._clock()
        # Created here and not before: standard error is what it is when the loop begins.
        console = self._console or Console(file=sys.stderr)
        if is_main_process() and console.is_terminal:
            self._live = LiveProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
                transient=False,
            )
            self._task = self._live.add_task(self.label, total=self.total, completed=self.done, figures="")
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self._task, completed=self.done, figures=str(self.figures()))
            self._live.stop()
            self._live = None
        elif self._steps and self._line_of not in (None, self.done):
            self._write_line()

    def step(self, *, images: int, waiting: float = 0.0) -> None:
        """One step is done: `images` of this process, `waiting` seconds of it spent waiting for the batch."""
        now = self._clock()
        self._steps.append((now - self._mark, waiting, images))
        self._mark = now
        self.done += 1
        if self._live is not None:
            self._live.update(self._task, completed=self.done)

    def show(self, *, loss: float | None = None) -> None:
        """Bring the display up to date; `loss` is the newest one known."""
        self._loss = loss if loss is not None else self._loss
        self._notice_collapse()
        self._tell_duration()
        if self._live is not None:
            self._live.update(self._task, figures=str(self.figures()))
        elif self._last_line is None or self._clock() - self._last_line >= self._line_every or self.done == self.total:
            self._write_line()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (an evaluation, a checkpoint) belongs to no step."""
        began = self._clock()
        try:
            yield
        finally:
            self._mark += self._clock() - began

    def figures(self) -> ProgressFigures:
        """The figures of this moment."""
        n = len(self._steps)
        seconds = sum(step[0] for step in self._steps)
        images = sum(step[2] for step in self._steps) * get_global_size()
        return ProgressFigures(
            step=self.done,
            total=self.total,
            loss=self._loss,
            iter_time=seconds / n if n else None,
            data_time=sum(step[1] for step in self._steps) / n if n else None,
            images_per_second=images / seconds if seconds > 0 else None,
            memory=peak_memory(self._device),
            seconds_to_go=max(0, self.total - self.done) * seconds / n if n else None,
        )

    def _notice_collapse(self) -> None:
        """Says once what helps when CPU threads wait for each other, because another program has one of their cores."""
        seconds = sum(step[0] - step[1] for step in self._steps)
        on_cpu = self._device is None or self._device.type == "cpu"
        if self._warned or not on_cpu or torch.get_num_threads() == 1 or len(self._steps) < _WINDOW or seconds <= 0:
            return
        rate = sum(step[2] for step in self._steps) / seconds
        self._fastest = max(self._fastest, rate)
        slower = f"steps take {self._fastest / rate:.0f} times as long as earlier in this run"
        collapsed = rate * _COLLAPSE < self._fastest
        if self._one_thread_gain is not None and not collapsed:  # once: steps may have been slow from the start
            with self.paused():
                gain, self._one_thread_gain = self._one_thread_gain(), None
            slower, collapsed = f"one thread would be {gain:.1f} times as fast", gain >= _CROWDED
        if collapsed:
            self._warned = True
            if is_main_process():
                _LOG.warning(
                    f"{slower}: another program seems to need the same cores, and {torch.get_num_threads()} threads "
                    "wait for each other; stop the run and give its command again with train.num_threads=1"
                )

    def _tell_duration(self) -> None:
        """Say once, after the first steps, how long the training will take."""
        if self._duration_told or len(self._steps) < _FIRST_STEPS or self.done >= self.total:
            return
        self._duration_told = True
        # The first step also loads code and fills caches.
        steps = list(self._steps)[1:]
        each = sum(step[0] for step in steps) / len(steps)
        if is_main_process():
            _LOG.info(
                f"the first steps took {each:.3g} s each: about {_duration(each * (self.total - self.done))} for the "
                f"{self.total - self.done:,} that are left, evaluations and checkpoints not counted"
            )

    def _write_line(self) -> None:
        if is_main_process():
            _LOG.info("%s %d/%d: %s", self.label, self.done, self.total, self.figures())
        self._last_line, self._line_of = self._clock(), self.done


def peak_memory(device: torch.device | None = None) -> int | None:
    """Most bytes this process held so far: on the GPU if `device` is one, else of main memory; None if unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device is not None and device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:  # Linux: the count below includes what the parent of this process held when it began
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h:02d}:{m:02d}:{s:02d}" if days else f"{h:d}:{m:02d}:{s:02d}"
