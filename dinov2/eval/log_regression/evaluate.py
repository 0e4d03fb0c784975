"""Logistic regression on frozen features: choose C on images held out of the training set, fit on all, score.

The public release chooses C with a split that depends on the device, and with `--finetune-on-val` on the very set that
it reports. Here the split is the same everywhere and keeps the classes' shares; choosing on the reported set is
possible, and noted in every row.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from dinov2.encode.stream import Features
from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError
from dinov2.eval.log_regression.estimator import Fitted, SolverBackend, fit_path
from dinov2.eval.outcome import Evaluation
from dinov2.eval.scoring import ClassPredictions, Provenance, match_classes, score_answers
from dinov2.eval.selection import (
    random_split,
    require_metric,
    require_trainable,
    selection_accuracy,
    stratified_split,
)

__all__ = ["C_GRID", "DEFAULT_MAX_ITER", "SelectOn", "evaluate_log_regression"]

C_GRID = tuple(10.0 ** (exponent / 4) for exponent in range(-24, 21))
"""The release's 45 values from 1e-6 to 1e5, four a decade."""

DEFAULT_MAX_ITER = 1000

SelectOn = Literal["split", "random-split", "val"]
"""Images for choosing C: a tenth of each training class, a tenth of all as in the release, or the reported set."""


class _Point(TypedDict):
    C: float
    accuracy: float
    iterations: int
    converged: bool


class _Choice(NamedTuple):
    """The sets that C is chosen with, and the rows that the final fit gets."""

    fit_features: Tensor
    fit_classes: Tensor
    scored_features: Tensor
    scored_targets: Tensor
    """Answers, where the set is scored among its own classes."""
    final_features: Tensor
    final_classes: Tensor
    named: str
    columns: Callable[[Tensor], Tensor] = lambda scores: scores
    """Of scores of all classes those of the answers."""


def evaluate_log_regression(
    train: Features,
    val: Features,
    *,
    finetune: Features | None = None,
    select_on: SelectOn = "split",
    metric: str = "mean_accuracy",
    Cs: Sequence[float] = C_GRID,
    tol: float = 1e-4,
    max_iter: int = DEFAULT_MAX_ITER,
    dtype: torch.dtype = torch.float32,
    at_once: int | None = None,
    device: torch.device | str | None = None,
    backend: SolverBackend = "torch",
    seed: int = 0,
    provenance: Provenance | None = None,
) -> Evaluation:
    """Top-1, top-5 and mean per class, in percent, of classifying `val` by logistic regression on `train`.

    Features are taken as they are: neither normalised nor standardised. The best C (the smallest of equals) is chosen
    on `finetune` where one is given, else as `select_on` says; the final fit is on everything but `val`.

    Args:
        finetune: a labelled set to choose C on; it joins the training set for the final fit.
        metric: one of `dinov2.eval.selection.METRICS`.
        Cs: the grid; a single value is taken without a choice.
        tol, max_iter, dtype, at_once, backend: as in `fit_path`.
        device: where to compute; None is the CPU.
        seed: of the split.
        provenance: further fields of every row (dataset, split, model, transform, precision).

    The rows' settings hold the whole curve of C. Over several processes all call with all features; each computes the
    sums of its share of the rows, and all get the same result.

    Raises:
        DataError: a set has no labels, there is one class only, the sets share none, or a feature is not finite.
        ConfigError: an unknown metric, a C that is not positive, or `finetune` given with `select_on="val"`.
    """
    require_metric(metric)
    if finetune is not None and select_on == "val":
        raise ConfigError("C is chosen either on the finetune set or on the validation set; leave one of them out")
    task = require_trainable(train, val)

    started = time.perf_counter()
    where = torch.device("cpu" if device is None else device)
    choice, notes = _choice(task, train, finetune, select_on, seed, where)
    fit_all = partial(
        fit_path, n_classes=task.n_classes, tol=tol, max_iter=max_iter, dtype=dtype, at_once=at_once, backend=backend
    )
    curve: list[_Point] = []
    best: Fitted | None = None
    if len(Cs) > 1:
        fits = fit_all(choice.fit_features, choice.fit_classes, Cs=sorted(Cs))
        for fit in fits:
            scores = choice.columns(fit.scores(choice.scored_features))
            value = selection_accuracy(scores, choice.scored_targets, metric=metric)
            curve.append(
                {"C": fit.C, "accuracy": 100 * value, "iterations": fit.n_iterations, "converged": fit.converged}
            )
        best = fits[max(range(len(fits)), key=lambda i: curve[i]["accuracy"])]  # the first of equals
    chosen = Cs[0] if best is None else best.C
    if best is None or len(choice.final_features) != len(choice.fit_features):
        (best,) = fit_all(choice.final_features, choice.final_classes, Cs=[chosen], start=best)
    if not best.converged:
        notes.append(f"the fit for C = {chosen:g} stopped after {best.n_iterations} iterations short of its tolerance")
    unfinished = [f"{point['C']:g}" for point in curve if not point["converged"]]
    if unfinished:
        notes.append(f"fits for C = {', '.join(unfinished)} stopped short of their tolerance while C was chosen")

    probabilities = task.answers.columns(best.scores(task.val_features.to(where))).softmax(dim=1)
    settings = {
        "C": chosen,
        "selected_on": choice.named if len(Cs) > 1 else "nothing: one C was given",
        "selected_by": metric,
        "curve": curve,
        "n_train": len(choice.final_features),
        "tol": tol,
        "max_iter": max_iter,
        "iterations": best.n_iterations,
        "gradient": best.gradient,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rows, outcome = score_answers(
        task,
        probabilities,
        method="logistic",
        settings=settings,
        notes=notes,
        seed=seed,
        seconds=time.perf_counter() - started,
        provenance=provenance,
    )
    return Evaluation(rows, {f"C={chosen:.4g}": outcome})


def _choice(
    task: ClassPredictions,
    train: Features,
    finetune: Features | None,
    select_on: SelectOn,
    seed: int,
    where: torch.device,
) -> tuple[_Choice, list[str]]:
    features, classes = task.train_features.to(where), task.train_classes.to(where)
    if finetune is not None:
        other = match_classes(train, finetune)
        require_finite(other.val_features, of="finetune images")
        more = other.val_features.to(where)
        known = (other.val_classes >= 0).to(where)
        return _Choice(
            features,
            classes,
            more,
            other.answers.targets.to(where),
            torch.cat([features, more[known]]),
            torch.cat([classes, other.val_classes.to(where)[known]]),
            "finetune set",
            other.answers.columns,
        ), [f"finetune set: {note}" for note in other.notes if note not in task.notes]
    match select_on:
        case "val":
            note = "C was chosen on the reported set itself, which flatters the figure"
            answers = task.answers
            scored_on = task.val_features.to(where), answers.targets.to(where)
            return _Choice(features, classes, *scored_on, features, classes, "reported set", answers.columns), [note]
        case "split":
            fitted, held_out = stratified_split(classes, seed=seed)
        case "random-split":
            fitted, held_out = random_split(len(classes))
            if not len(held_out):
                raise DataError(f"a tenth of {len(classes)} training images is none; choose C with select_on='split'")
        case _:
            raise ConfigError(f"C is chosen on split, random-split or val, not on {select_on!r}")
    named = f"{len(held_out)} of {len(classes)} training images"
    parts = features[fitted], classes[fitted], features[held_out], classes[held_out]
    return _Choice(*parts, features, classes, named), []
