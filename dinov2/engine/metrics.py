"""Figures of a run on disk: rows of metrics, skipped steps, unreadable images, and TensorBoard where it is installed.

Metrics are JSON lines under the release's name `training_metrics.json`: one row is one write that ends in a newline, so
a killed run leaves at most one half line, which both reader and writer drop. A resumed run cuts the file back to the
step it starts from. JSON knows no NaN and no infinity; they are written as null.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2.distributed import is_main_process
from dinov2.engine.run_folder import RunFolder
from dinov2.errors import DataError, TrainingDiverged
from dinov2.whole_files import atomic_write

__all__ = [
    "MetricsWriter",
    "SkippedSteps",
    "TensorBoardTracker",
    "UnreadableImages",
    "read_metrics",
    "tensorboard_tracker",
]

_LOG = logging.getLogger("dinov2")


class MetricsWriter:
    """Appends rows to a JSON-lines file; each row is on disk for readers when `write` returns.

    Opening drops a last line that a killed process left unfinished. One process of a run holds the writer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- held until close()
        self._drop_unfinished_line()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers may be Python's, numpy's or one-element tensors."""
        line = json.dumps({key: _as_json(value) for key, value in row.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def cut_back(self, first_iteration_to_drop: int) -> None:
        """Drop all rows with `iteration >= first_iteration_to_drop`; the file is replaced at once or not at all."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if not _is_from(row.get("iteration"), first_iteration_to_drop)]
        if len(kept) == len(rows):
            return
        self._file.close()
        with atomic_write(self.path) as unfinished:
            unfinished.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- held until close()

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _drop_unfinished_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)


def _is_from(iteration: object, first: int) -> bool:
    return isinstance(iteration, int | float) and iteration >= first


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; a half-written last line is left out.

    Raises `DataError` when the file is missing or when any other line is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"the metrics file {os.fspath(path)} cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or unfinished
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or nested too deep for Python's stack
            row = None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {os.fspath(path)} is not a row of metrics; delete the line to go on")
        rows.append(row)
    return rows


class TensorBoardTracker:
    """Sends the numbers of metrics rows to TensorBoard event files; see `tensorboard_tracker`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        """One scalar per number of the row, at step `row["iteration"]`."""
        for key, value in row.items():
            number = _as_json(value)
            if key != "iteration" and isinstance(number, int | float):
                self._writer.add_scalar(key, number, row["iteration"])

    def close(self) -> None:
        """Write out what is pending and close the event file."""
        self._writer.close()


def tensorboard_tracker(run: str | os.PathLike[str], *, first_iteration: int = 0) -> TensorBoardTracker | None:
    """A tracker that writes below `<run>/tensorboard`, or None where the package `tensorboard` cannot.

    It is not installed, or the run's folder has a name that is not UTF-8.

    Events of an earlier part of the run from `first_iteration` on are hidden, as `MetricsWriter.cut_back` drops rows.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    folder = str(Path(run) / "tensorboard")
    try:
        folder.encode()
    except UnicodeEncodeError:
        logging.getLogger("dinov2").warning(
            "TensorBoard takes names in UTF-8 alone, and the run's folder has another: its events are not written"
        )
        return None
    purge = first_iteration if first_iteration > 0 else None
    return TensorBoardTracker(SummaryWriter(folder, purge_step=purge))


class SkippedSteps:
    """Notices steps with a non-finite loss or gradient; several in a row end the run.

    On a CPU the outcome is at hand; on other devices outcomes pile up until `check`, which waits for the device.
    """

    def __init__(
        self, run: RunFolder, *, first: int, most_in_a_row: int, images_of: Callable[[Tensor], list[str]]
    ) -> None:
        self._file, self._most, self._images_of = run.skipped, most_in_a_row, images_of
        self._open: list[tuple[int, Tensor, Mapping[str, Tensor], Tensor]] = []
        in_a_row = run.checkpoints.read_meta(first).get("skipped_in_a_row") if first else 0
        self.in_a_row = in_a_row if isinstance(in_a_row, int) else 0
        if is_main_process() and self._file.exists():
            with MetricsWriter(self._file) as written:
                written.cut_back(first)
        self.count = 0

    def note(self, step: int, finite: Tensor, losses: Mapping[str, Tensor], sample_numbers: Tensor) -> None:
        """Take in the outcome of a step: whether it was finite, its detached losses, the numbers of its samples."""
        self._open.append((step, finite, losses, sample_numbers))
        if finite.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Write skipped steps down; raises `TrainingDiverged` after `train.max_skipped_steps` in a row."""
        for step, finite, losses, numbers in self._open:
            if bool(finite):
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.count += 1
            self._write(step, losses, numbers)
        self._open.clear()
        if self.in_a_row >= self._most:
            raise TrainingDiverged(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row and the run was stopped; "
                f"the steps, losses and images are in {self._file}. Try a lower optim.base_lr, a "
                "longer optim.warmup_epochs, a smaller optim.clip_grad or train.precision=fp32, in a new --output-dir"
            )

    def _write(self, step: int, losses: Mapping[str, Tensor], numbers: Tensor) -> None:
        if not is_main_process():
            return
        terms = {name: _number_or_text(value) for name, value in losses.items()}
        _LOG.warning(f"step {step} was skipped: its loss ({terms['total']}) or gradient is not finite")
        row = {
            "iteration": step,
            "losses": terms,
            "sample_numbers": numbers.tolist(),
            "images": self._images_of(numbers) if bool((numbers >= 0).all()) else [],
        }
        with MetricsWriter(self._file) as written:
            written.write(row)


class UnreadableImages:
    """Images that could not be read: counted, listed in the run's folder, and said once in a while."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self.reasons = self._run.read_unreadable()
        self._written = len(self.reasons)

    def note(self, failures: Iterable[tuple[str, str]]) -> None:
        """Take in the failures of a batch, path and reason; the first of a run is said at once."""
        for path, reason in failures:
            if not self.reasons:
                _LOG.warning(f"an image cannot be read and is replaced by another: {reason}")
            self.reasons.setdefault(path, reason)

    def write(self) -> None:
        """Bring the list in the run's folder up to date."""
        if len(self.reasons) > self._written and is_main_process():
            self._run.note_unreadable(self.reasons)
            self._written = len(self.reasons)


def _as_json(value: Any) -> Any:
    """A number as Python's own, None for what JSON cannot hold; anything else unchanged."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number_or_text(value: Tensor) -> float | str:
    number = value.item()
    return number if math.isfinite(number) else str(number)  # JSON has no word for the others
