"""The files of a run's folder, read for its report. Each may be missing; a broken one is named among the problems.

config.yaml, training_metrics.json, evaluation_metrics.json, knn_curve.json, summary.json, results_eval_knn.json,
unreadable_images.json and skipped_steps.json are written by training and evaluation; the pictures of `report_data/` by
`dinov2.report.pictures`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinov2.engine.metrics import read_metrics
from dinov2.errors import DataError
from dinov2.eval.result import Result, read_results
from dinov2.report.charts import Point
from dinov2.report.neighbours import Shot, ShotRow
from dinov2.report.render import PNG_START
from dinov2.whole_files import read_json

__all__ = ["RunRecord", "read_run"]

_EVALUATIONS = {"knn": "k-NN", "logistic": "logistic regression", "linear": "linear probe"}
_PICTURE_STARTS = (PNG_START, b"\xff\xd8\xff")  # PNG, JPEG


@dataclass
class RunRecord:
    """Content of a report; empty where the folder holds nothing."""

    name: str
    config: dict[str, dict[object, object]] = field(default_factory=dict)
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    """Key of `training_metrics.json` -> (iteration, value)."""
    knn_curve: list[Point] = field(default_factory=list)
    evaluations: dict[str, list[Point]] = field(default_factory=dict)
    """Name of an accuracy -> (iteration, per cent)."""
    summary: dict[str, float] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)
    """Versions and hardware, as noted when the figures were made."""
    results: list[Result] = field(default_factory=list)
    pca_images: bytes | None = None
    pca_strips: list[tuple[int, bytes]] = field(default_factory=list)
    gallery: list[ShotRow] = field(default_factory=list)
    """Queries and their neighbours, nearest first."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    skipped_steps: int = 0
    problems: list[str] = field(default_factory=list)
    """One sentence for each file that is there and cannot be used."""


def read_run(folder: Path | str) -> RunRecord:
    """Collect what the folder of a run holds. Raises `DataError` when there is no such folder or nothing in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder, so there is no run to report on; give the output folder of a training")
    run = RunRecord(name=folder.absolute().name)
    readers: dict[str, Callable[[Path, RunRecord], None]] = {
        "config.yaml": _config,
        "training_metrics.json": _metrics,
        "knn_curve.json": _knn_curve,
        "evaluation_metrics.json": lambda path, run: run.evaluations.update(_evaluations(path)),
        "summary.json": _summary,
        "results_eval_knn.json": _results,
        "unreadable_images.json": _unreadable,
        "skipped_steps.json": _skipped,
        "report_data/pca": _pca,
        "report_data/neighbours.json": _gallery,
    }
    present = 0
    for name, read in readers.items():
        if not (folder / name).exists():
            continue
        present += 1
        try:
            read(folder / name, run)
        except Exception as error:  # a report about half a run is worth more than none; the page says what is missing
            run.problems.append(f"{name} cannot be used: {' '.join(str(error).split()) or type(error).__name__}")
    if not present:
        raise DataError(
            f"{folder} holds nothing of a training run (no config.yaml, training_metrics.json or summary.json); "
            "give the output folder of a training"
        )
    return run


def _evaluations(file: Path) -> dict[str, list[Point]]:
    """The curves of `evaluation_metrics.json`: a name such as `k-NN top-1 (k=20)` -> (iteration, per cent)."""
    curves: dict[str, list[Point]] = {}
    for row in read_metrics(file):
        if row["value"] is not None:
            name = f"{_EVALUATIONS.get(row['task'], row['task'])} {row['metric']} ({row['setting']})"
            curves.setdefault(name, []).append((float(row["iteration"]), float(row["value"])))
    return curves


def _config(path: Path, run: RunRecord) -> None:
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        raise DataError("it is no table of keys")
    if wrong := [str(key) for key, value in content.items() if not isinstance(value, dict)]:
        raise DataError(f"{wrong[0]} is no section with keys below")
    run.config = {str(key): value for key, value in content.items()}


def _metrics(path: Path, run: RunRecord) -> None:
    for row in read_metrics(path):
        iteration = row.get("iteration")
        if not isinstance(iteration, int | float) or not math.isfinite(iteration):
            continue
        for key, value in row.items():
            if key != "iteration" and isinstance(value, int | float) and not isinstance(value, bool):
                run.metrics.setdefault(key, []).append((iteration, float(value)))


def _knn_curve(path: Path, run: RunRecord) -> None:
    points = [(float(point["iteration"]), float(point["top1"])) for point in read_json(path, list)]
    run.knn_curve = sorted((x, y) for x, y in points if math.isfinite(y))


def _summary(path: Path, run: RunRecord) -> None:
    content = read_json(path, dict)
    run.summary = {key: float(value) for key, value in content.items() if isinstance(value, int | float)}
    if isinstance(content.get("environment"), dict):
        run.environment = content["environment"]


def _results(path: Path, run: RunRecord) -> None:
    run.results = read_results(path)
    if run.results and not run.environment:
        run.environment = dict(run.results[0].versions)


def _unreadable(path: Path, run: RunRecord) -> None:
    run.unreadable = [(str(row["path"]), str(row["reason"])) for row in read_json(path, dict)["images"]]


def _skipped(path: Path, run: RunRecord) -> None:
    run.skipped_steps = len(read_metrics(path))


def _pca(folder: Path, run: RunRecord) -> None:
    images = folder / "images.png"
    run.pca_images = _picture(images) if images.is_file() else None
    numbered = {
        int(file.stem.removeprefix("step_")): file
        for file in folder.glob("step_*.png")
        if file.stem.removeprefix("step_").isdigit()
    }
    run.pca_strips = [(iteration, _picture(numbered[iteration])) for iteration in sorted(numbered)]


def _gallery(path: Path, run: RunRecord) -> None:
    def shot(item: Mapping[str, Any], note: str, kind: str = "") -> Shot:
        return Shot(_picture(path.parent / item["image"]), str(item.get("label") or ""), note, kind=kind)

    for row in read_json(path, list):
        shots = [shot(row["query"], "query", "query")]
        for item in row["neighbours"]:
            similarity, correct = item.get("similarity"), item.get("correct")
            note = "" if similarity is None else f"{similarity:.2f}"
            shots.append(shot(item, note, "" if correct is None else "right" if correct else "wrong"))
        run.gallery.append(ShotRow(tuple(shots)))


def _picture(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(_PICTURE_STARTS):
        raise DataError(f"{path.name} is neither PNG nor JPEG")
    return data
