"""The files of a run's folder, read for a diagnosis: rows of the log, configuration, skipped steps, checkpoints.

Only files are read, so that a run may be alive, dead or on another machine; a folder of the public release's training
is read as well, as far as it goes. Times are those of the files.
"""

import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.configs import Config, load_config
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.engine.metrics import read_metrics
from dinov2.errors import DataError, DinoError
from dinov2.file_lock import is_held
from dinov2.whole_files import read_json

__all__ = ["MetricSeries", "RunLog", "read_run_log"]

MetricSeries = list[tuple[int, float]]
"""(iteration, value), in order; values that were not finite are NaN."""

_RELEASE_CHECKPOINT = re.compile(r"model_(\d+)\.rank_0\.pth")
_PID = re.compile(rb"^[A-Z]\d{8} [\d:]+ (\d+) ", re.MULTILINE)


@dataclass(frozen=True)
class RunLog:
    """The files of a run as plain values."""

    name: str
    rows: list[dict[str, Any]]
    """Of `training_metrics.json`, one an iteration, in order; None stands for a value that was not finite."""
    cfg: Config | None = None
    """None when there is no readable `config.yaml`."""
    unusable: str = ""
    """Reason that an existing `config.yaml` cannot be read."""
    skipped: list[int] = field(default_factory=list)
    """Iterations of steps that were not finite."""
    unreadable: int = 0
    """Images that could not be read."""
    checkpoints: list[int] = field(default_factory=list)
    """Steps done at each complete checkpoint that is still there."""
    accuracies: dict[str, MetricSeries] = field(default_factory=dict)
    """Evaluations on the way by name, in per cent, in order."""
    baselines: dict[str, float] = field(default_factory=dict)
    """k-NN accuracies to beat, in per cent, where `summary.json` has them: `raw_pixels`, `untrained`."""
    silent_for: float | None = None
    """Seconds since something was last written; None when it is not known."""
    process: int | None = None
    """Number of the process that wrote the log, if it is on this machine and still holds it open."""
    locked: bool | None = None
    """Whether a training holds the folder's lock; None when that is not known (the release, a disk without locks)."""
    paused: bool = False
    """Whether that process was told to stop (a signal, Ctrl-Z) and waits to be continued."""

    def series(self, key: str) -> MetricSeries:
        """The values of a key in the rows that have it."""
        return [(int(row["iteration"]), _number(row[key])) for row in self.rows if key in row]

    def last_iteration(self) -> int:
        """Of the last row; -1 without rows."""
        return int(self.rows[-1]["iteration"]) if self.rows else -1


def read_run_log(folder: str | os.PathLike[str], *, now: float | None = None) -> RunLog:
    """Read a run's folder; `now` is the time to count from, in seconds since 1970.

    Raises `DataError` when the folder is none of a training, or its log cannot be used.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} is no folder, so there is no run to examine; give the output folder of a training")
    metrics, config = path / "training_metrics.json", path / "config.yaml"
    if not metrics.exists() and not config.exists():
        raise DataError(
            f"{path} holds no training (neither config.yaml nor training_metrics.json); "
            "give the output folder of a training"
        )
    process = _process(path / "logs" / "log.txt")
    cfg, unusable = _config(config)
    return RunLog(
        name=path.resolve().name or str(path),
        rows=_in_order(_steps(metrics)),
        cfg=cfg,
        unusable=unusable,
        skipped=sorted({int(row["iteration"]) for row in _steps(path / "skipped_steps.json")}),
        unreadable=_unreadable(path / "unreadable_images.json"),
        checkpoints=_checkpoints(path),
        accuracies=_accuracies(path),
        baselines=_baselines(path / "summary.json"),
        silent_for=_silence(path, now if now is not None else time.time()),
        process=process,
        locked=_locked(path),
        paused=process is not None and _is_paused(process),
    )


def _steps(file: Path) -> list[dict[str, Any]]:
    """Rows that belong to a step; none where there is no file. JSON has no NaN, but the release wrote some."""
    rows = read_metrics(file) if file.exists() else []
    steps = []
    for row in rows:
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        iteration = plain.get("iteration")
        if isinstance(iteration, int | float) and abs(iteration) < 2**63:
            steps.append(plain)
    return steps


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the rows that a resumed run wrote again: the release appends, and leaves the old ones in place."""
    rows_in_order: list[dict[str, Any]] = []
    for row in rows:
        while rows_in_order and rows_in_order[-1]["iteration"] >= row["iteration"]:
            rows_in_order.pop()
        rows_in_order.append(row)
    return rows_in_order


def _checkpoints(folder: Path) -> list[int]:
    """Steps done at each checkpoint; the release's are files `model_0001249.rank_0.pth` named by their last step."""
    ours = CheckpointStore(folder / "checkpoints").steps() if (folder / "checkpoints").is_dir() else []
    matches = (_RELEASE_CHECKPOINT.fullmatch(file.name) for file in folder.glob("model_*.rank_0.pth"))
    return sorted({*ours, *(int(match[1]) + 1 for match in matches if match is not None)})


def _number(value: object) -> float:
    """A number of a row; null stands for one that was not finite."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number beyond float64
        return math.nan


def _config(file: Path) -> tuple[Config | None, str]:
    """The configuration, or why there is none; "" where there is no file."""
    try:
        return (load_config(str(file)) if file.exists() else None), ""
    except DinoError as error:  # of another version, or edited: what the log says still counts
        return None, str(error)


# Small files are being rewritten while a run lives, and may be broken: the log says enough without them.
_UNUSABLE = (ValueError, LookupError, TypeError, OverflowError)


def _unreadable(file: Path) -> int:
    try:
        return int(read_json(file, dict)["count"])
    except _UNUSABLE:
        return 0


def _accuracies(folder: Path) -> dict[str, MetricSeries]:
    curves: dict[str, MetricSeries] = {}
    with suppress(*_UNUSABLE):
        points = read_json(folder / "knn_curve.json", list)
        curves["k-NN top-1"] = [(int(point["iteration"]), _number(point["top1"])) for point in points]
    for row in _steps(folder / "evaluation_metrics.json"):
        if row.get("metric") == "top-1" and row.get("task") not in (None, "knn"):
            series = curves.setdefault(f"{row['task']} top-1", [])
            series.append((int(row["iteration"]), _number(row.get("value"))))
    return {name: sorted(series) for name, series in curves.items()}


def _baselines(file: Path) -> dict[str, float]:
    try:
        summary = read_json(file, dict)
        return {name: float(summary[name]) for name in ("raw_pixels", "untrained") if name in summary}
    except _UNUSABLE:
        return {}


def _silence(folder: Path, now: float) -> float | None:
    names = ("config.yaml", "training_metrics.json", "logs/log.txt", "evaluation_metrics.json")
    files = [folder / name for name in names]
    files += [*(folder / "eval").glob("*"), *(folder / "checkpoints").glob("*"), *folder.glob("model_*.pth")]
    times = [written for file in files if (written := _written(file)) is not None]
    return max(0.0, now - max(times)) if times else None


def _written(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:  # not there, or gone since it was listed: a live run clears old checkpoints away
        return None


def _process(log: Path) -> int | None:
    """The last process that wrote to the log, if it still holds it open (where the system tells)."""
    try:
        numbers = _PID.findall(log.read_bytes()[-65536:])
        if not numbers or int(numbers[-1]) == os.getpid():
            return None
        # The number alone may have gone to another process since.
        held = {os.path.realpath(entry) for entry in Path(f"/proc/{int(numbers[-1])}/fd").iterdir()}
    except OSError:
        return None
    return int(numbers[-1]) if os.path.realpath(log) in held else None


def _locked(folder: Path) -> bool | None:
    lock = folder / ".train.lock"
    # Only trainings of this package have a lock; a clean end removes it and leaves a checkpoint.
    known = lock.exists() or bool(CheckpointStore(folder / "checkpoints").steps())
    return is_held(lock) if known else None


def _is_paused(process: int) -> bool:
    """Whether the process is stopped by a signal (where the system tells)."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[:1] == ["T"]
