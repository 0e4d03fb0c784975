"""Logistic regression on the features of any model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinov2.apps.evaluation.datasets import NamedSet, labelled
from dinov2.apps.evaluation.session import Inputs, session, with_split
from dinov2.distributed import is_main_process
from dinov2.engine.parallel import choose_device
from dinov2.errors import ConfigError
from dinov2.eval.log_regression import C_GRID, DEFAULT_MAX_ITER, evaluate_log_regression
from dinov2.eval.result import Result, write_results

__all__ = ["LOG_REGRESSION_FILE", "ProbeReport", "log_regression"]

LOG_REGRESSION_FILE = "results_eval_log_regression.json"

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class ProbeReport:
    """The rows of an evaluation, and where they were written."""

    rows: list[Result]
    output_dir: Path
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def value(self, metric: str = "top-1") -> float:
        """The first figure of that name, in percent."""
        return next(row.value for row in self.rows if row.metric == metric)


def log_regression(
    inputs: Inputs,
    *,
    finetune_dataset: str | None = None,
    select_on: Any = "split",
    metric: str = "mean_accuracy",
    Cs: Sequence[float] = C_GRID,
    max_iter: int = DEFAULT_MAX_ITER,
    dtype: str = "float32",
    fit_device: str | None = None,
    backend: Any = "torch",
) -> ProbeReport:
    """Fits class tokens of any model and writes `results_eval_log_regression.json`, the whole curve of C with it.

    `finetune_dataset` is what C is chosen on, `fit_device` where the fits run (None: where the model runs); all else
    is as in `dinov2.eval.log_regression.evaluate_log_regression`. Raises what that raises, before it where possible.
    """
    if max_iter < 1:
        raise ConfigError(f"the number of iterations is {max_iter}; write 1 or more")
    if not Cs or min(Cs) <= 0:
        raise ConfigError(f"C must be positive, got {list(Cs)}; write values such as 0.1 1 10")
    if dtype not in _DTYPES:
        raise ConfigError(f"features are fitted in {' or '.join(_DTYPES)}, not in {dtype!r}")
    if finetune_dataset and select_on == "val":
        raise ConfigError("C is chosen either on the finetune set or on the validation set; leave one of them out")
    where = None if fit_device is None else choose_device(fit_device)
    with session(inputs, task="log-regression") as opened:
        finetune = NamedSet(finetune_dataset, labelled(finetune_dataset)) if finetune_dataset else None
        subject = opened.subject()
        train, val = opened.features(subject)
        evaluation = evaluate_log_regression(
            train,
            val,
            finetune=None if finetune is None else opened.bank.features(subject, finetune),
            select_on=select_on,
            metric=metric,
            Cs=Cs,
            max_iter=max_iter,
            dtype=_DTYPES[dtype],
            device=where or subject.device,
            backend=backend,
            provenance=opened.provenance(subject),
        )
        rows = with_split(evaluation.rows, opened.sets)
        if is_main_process():
            write_results(opened.folder / LOG_REGRESSION_FILE, rows)
        return ProbeReport(rows, opened.folder, opened.unreadable(subject))
