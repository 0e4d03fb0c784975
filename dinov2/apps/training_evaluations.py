"""Accuracies while a training runs: features once, then every evaluation that `evaluation.tasks` names.

Figures go to `evaluation_metrics.json` in the run's folder, a JSON object a line: `iteration`, `task`, `metric`,
`value` (per cent), and `setting` (`k=20`, `C=1`, `preset short`). Those of k-NN also go to `knn_curve.json`.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dinov2.apps.evaluation.datasets import labelled
from dinov2.configs import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.encode.stream import Features, extract_features
from dinov2.engine.metrics import MetricsWriter
from dinov2.engine.parallel import choose_precision
from dinov2.errors import DataError
from dinov2.eval.knn import evaluate_knn
from dinov2.eval.linear import evaluate_linear
from dinov2.eval.log_regression.estimator import fit_path
from dinov2.eval.result import Result
from dinov2.eval.scoring import match_classes
from dinov2.eval.setup import eval_transform_for
from dinov2.train.setup import Training
from dinov2.train.train import Evaluate
from dinov2.whole_files import read_json, write_json

__all__ = ["EVALUATION_METRICS", "KNN_CURVE", "TASKS", "accuracy_evaluation"]

_LOG = logging.getLogger("dinov2")

KNN_CURVE = "knn_curve.json"
"""In a run's folder: `[{"iteration": ..., "top1": ...}, ...]`, top-1 in percent."""

EVALUATION_METRICS = "evaluation_metrics.json"
"""In a run's folder: every figure of every evaluation on the way, JSON lines."""

_NAMES = {"knn": "k-NN", "logistic": "logistic regression", "linear": "linear probe"}
# One strength of the penalty, on L2-normalised features: the same at every evaluation, so that the curve compares.
_LOGISTIC_C = 1.0
_LINEAR_PRESET = "short"


def accuracy_evaluation(cfg: Config) -> Evaluate:
    """Accuracies of the teacher on the data sets of the section `evaluation`, added to the run's curves.

    The data sets are opened at once, so that a wrong name is known before training begins.
    """
    sets = labelled(cfg.evaluation.knn_train_dataset), labelled(cfg.evaluation.knn_val_dataset)

    def evaluate(training: Training, iteration: int) -> None:
        train, val = (_features(training, images, cfg) for images in sets)
        rows = [row for task in cfg.evaluation.task_names for row in TASKS[task](train, val, cfg, training.device)]
        for row in rows:
            if row.metric == "top-1":
                _LOG.info(f"{_NAMES[row.task]} after {iteration + 1:,} steps: {row.value:.1f} %")
        if is_main_process():
            _write(training.run.path, iteration, rows)

    return evaluate


def _features(training: Training, images: ImageDataset, cfg: Config) -> Features:
    backbone: Any = training.objective.teacher["backbone"]
    precision = "fp32" if training.precision is None else "auto"
    return extract_features(
        backbone,
        images,
        transform=eval_transform_for(cfg),
        channels=cfg.student.in_chans,
        device=training.device,
        autocast_dtype=choose_precision(precision, training.device),
    )


def _knn(train: Features, val: Features, cfg: Config, device: torch.device) -> list[Result]:
    settings = cfg.evaluation
    return evaluate_knn(train, val, nb_knn=[settings.knn_k], temperature=settings.knn_temperature, device=device)


def _logistic(train: Features, val: Features, cfg: Config, device: torch.device) -> list[Result]:
    matched = match_classes(train, val)
    rows, val_rows = (
        torch.nn.functional.normalize(part, dim=1).to(device) for part in (matched.train_features, matched.val_features)
    )
    (fitted,) = fit_path(rows, matched.train_classes, n_classes=matched.n_classes, Cs=[_LOGISTIC_C])
    answers = matched.answers.columns(fitted.scores(val_rows)).argmax(dim=1).cpu()
    top1 = 100.0 * (answers == matched.answers.targets).double().mean().item()
    return [Result(task="logistic", metric="top-1", value=top1, n=len(answers), settings={"C": _LOGISTIC_C})]


def _linear(train: Features, val: Features, cfg: Config, device: torch.device) -> list[Result]:
    # On class tokens alone and with few steps: the full protocol is a job of its own.
    return evaluate_linear(train, val, preset=_LINEAR_PRESET, device=device).rows


TASKS: Mapping[str, Callable[[Features, Features, Config, torch.device], list[Result]]] = {
    "knn": _knn,
    "logistic": _logistic,
    "linear": _linear,
}
"""Evaluations by their names in `evaluation.tasks`: training features, validation features -> rows."""


def _write(folder: Path, iteration: int, rows: list[Result]) -> None:
    """Adds the figures to the run's curves; what a resumed run measures again replaces the old points."""
    with MetricsWriter(folder / EVALUATION_METRICS) as writer:
        try:
            writer.cut_back(iteration)
        except DataError as error:  # hours of training must not end for it
            _LOG.warning(f"accuracies are written behind a damaged line: {error}")
        for row in rows:
            written = {"task": row.task, "metric": row.metric, "value": row.value, "setting": _setting(row)}
            writer.write({"iteration": iteration, **written})
    top1 = [row.value for row in rows if row.task == "knn" and row.metric == "top-1"]
    if top1:
        file = folder / KNN_CURVE
        curve = [point for point in _written_points(file) if point["iteration"] < iteration]
        write_json(file, [*curve, {"iteration": iteration, "top1": top1[0]}])


def _written_points(file: Path) -> list[dict[str, Any]]:
    """The points of the curve so far; those that cannot be read are left out with a warning."""
    if not file.exists():
        return []
    try:
        points = read_json(file, list)
    except DataError as error:
        _LOG.warning(f"the curve of accuracies is begun anew: {error}")
        return []
    return [point for point in points if isinstance(point, dict) and isinstance(point.get("iteration"), int | float)]


def _setting(row: Result) -> str:
    """Setting of a figure, in a word."""
    match row.task:
        case "knn":
            return f"k={row.k}"
        case "logistic":
            return f"C={row.settings['C']:g}"
        case _:
            return f"preset {_LINEAR_PRESET}"
