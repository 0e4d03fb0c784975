"""The linear probe on cached features: train the whole grid, choose a head on held-out images, score it.

The public release reports the best of its heads on the very set that it scores. Here the head is chosen on images held
out of the training set; the release's figure is in the settings beside it, so that the optimism can be read off, and
becomes the reported one with `select_on="val"`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dinov2.checkpoints.files import state_digest
from dinov2.encode.stream import Features
from dinov2.encode.tokens import require_finite
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DataError
from dinov2.eval.linear.heads import PRESETS, LinearHeads, LinearSettings, TokenColumns, head_table
from dinov2.eval.linear.training import Batches, cached_batches, train_heads
from dinov2.eval.outcome import Evaluation, EvaluationOutcome
from dinov2.eval.result import Result
from dinov2.eval.scoring import Answers, ClassPredictions, Provenance, class_numbers, match_classes, score_answers
from dinov2.eval.selection import require_metric, require_trainable, selection_accuracy, stratified_split
from dinov2.models.heads import LinearHead

__all__ = ["LinearEvaluation", "LiveBatches", "evaluate_head", "evaluate_linear", "held_out_rows"]

_HELD_OUT_AT_MOST = 10_000
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class LiveBatches:
    """Training batches that do not come from cached features.

    `batches` gives classes as positions among the ascending labels of the training set, and never an image of
    `held_out_rows`; `identity` says in plain values what they are made of (data set, augmentation, model, seed).
    """

    batches: Batches
    identity: Mapping[str, object]
    note: str = ""
    """Joins the notes of the rows."""
    n_images: int | None = None
    """Different images that they are drawn from; None where `train` holds these very images."""
    held_out: Features | None = None
    """Features of the images of `held_out_rows`, where `train` does not hold the training images."""


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(Evaluation):
    """The rows and outcomes of a linear probe, and all heads that were trained."""

    heads: LinearHeads
    chosen: int
    """Number of the head that the rows are of, in the table of the heads."""


def held_out_rows(labels: Tensor, *, seed: int = 0) -> Tensor:  # int64 [S] -> int64 [H]
    """The labelled training images that heads are chosen on: a tenth of each class, 10,000 in all at most."""
    return stratified_split(labels, at_most=_HELD_OUT_AT_MOST, seed=seed)[1]


def evaluate_linear(
    train: Features,
    val: Features,
    *,
    columns: TokenColumns | None = None,
    preset: str = "release",
    settings: LinearSettings | None = None,
    select_on: Literal["split", "val"] = "split",
    metric: str = "mean_accuracy",
    tests: Sequence[tuple[str, Features]] = (),
    live: LiveBatches | None = None,
    checkpoints: CheckpointStore | None = None,
    evaluate_every: int = 1250,
    on_step: Callable[[int, int], None] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    provenance: Provenance | None = None,
) -> LinearEvaluation:
    """Top-1, top-5 and mean per class, in percent, of the best linear classifier of the grid, and all classifiers.

    Args:
        columns: what the feature rows [S, W] are made of; None takes them as one class token of one block.
        preset: `release` for the release's protocol, `short` for one that a CPU can do; `settings` goes before it.
        select_on: choose the head on training images held out of the training, or on `val` as the release does.
        metric: one of the release's names; the head is chosen by top-1, or by its mean over classes.
        tests: further sets that the chosen head is scored on, and their names.
        live: trains on these batches in place of the rows of `train`, of which one row of each class is enough where
            the batches bring the held-out images or the head is chosen on `val`.
        checkpoints: where training saves, and continues from.
        evaluate_every: iterations between two looks at the selection set.
        on_step: called with (iterations done, iterations in all).
        device: where to train; None is the CPU.
        seed: of the held-out images, the first weights and the order of batches.
        provenance: further fields of every row (dataset, split, model, transform, precision).

    The rows' settings hold the whole grid. Over several processes all call with all features; each works on its share
    of every batch, and all get the same result.

    Raises:
        DataError: a set has no labels, there is one class only, sets share none, or a feature is not finite.
        ConfigError: an unknown preset or metric, `columns` that do not fit, or a foreign checkpoint.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset of the linear probe is called {preset!r}; choose one of {', '.join(PRESETS)}")
    require_metric(metric)
    if select_on not in ("split", "val"):
        raise ConfigError(f"a head is chosen on split or val, not on {select_on!r}")
    settings = PRESETS[preset] if settings is None else settings
    columns = TokenColumns(train.features.shape[1], 1, pooled=False) if columns is None else columns
    for features in (train, val, *(features for _, features in tests)):
        columns.check(features.features)
    task = require_trainable(train, val)
    further = [(name, match_classes(train, features)) for name, features in tests]
    for name, other in further:
        require_finite(other.val_features, of=f"images of {name}")

    started = time.perf_counter()
    heads = LinearHeads(
        head_table(settings, columns), columns, n_classes=task.n_classes, device=device or "cpu", seed=seed
    )
    selection, fitted = _selection(task, train, select_on, live, seed)
    notes = [*_notes(settings, live, columns), *selection.notes]
    if live is None:
        live = _cached(task.train_features[fitted], task.train_classes[fitted], settings.batch_size, seed)
    looks: list[int] = []
    curves: list[list[float]] = []

    def after(done: int, losses: Tensor) -> None:
        if on_step is not None:
            on_step(done, settings.n_iterations)
        if done % evaluate_every == 0 and done != settings.n_iterations:
            looks.append(done)
            curves.append(_accuracies(heads, selection, metric))

    first_iteration = train_heads(
        heads,
        live.batches,
        n_iterations=settings.n_iterations,
        momentum=settings.momentum,
        checkpoints=checkpoints,
        identity={**live.identity, "batch_size": settings.batch_size, "seed": seed, "n_held_out": selection.n_split},
        after=after,
    )
    if first_iteration:
        notes.append(f"training continued from iteration {first_iteration}")
    accuracies = _accuracies(heads, selection, metric)
    best = max(range(len(accuracies)), key=accuracies.__getitem__)  # the first of equals, in the order of the grid
    if accuracies[best] == 0:
        notes.append("no head was right about a single image that heads are chosen on")
    reported = accuracies if select_on == "val" else _accuracies(heads, _reported(task), metric)
    table: dict[str, object] = {
        "head": heads.table[best].name,
        "rate": heads.table[best].rate,
        "selected_on": selection.name,
        "selected_by": metric,
        "best_of_grid_on_reported": max(reported),
        "grid": [
            {
                "name": head.name,
                "release_name": head.release_name,
                "rate": head.rate,
                "selection": own,
                "reported": other,
            }
            for head, own, other in zip(heads.table, accuracies, reported, strict=True)
        ],
        "curve": {"iterations": looks, "selection": [values[best] for values in curves]},
        "n_iterations": settings.n_iterations,
        "batch_size": settings.batch_size,
        "n_train": len(fitted) if live.n_images is None else live.n_images,
    }
    rows, outcomes = _score_head(
        heads,
        best,
        [("", task), *further],
        settings=table,
        notes=notes,
        seed=seed,
        started=started,
        provenance=provenance,
    )
    return LinearEvaluation(rows, outcomes, heads=heads, chosen=best)


def evaluate_head(
    head: LinearHead,
    val: Features,
    *,
    class_ids: tuple[str, ...] | None = None,
    class_names: tuple[str, ...] | None = None,
    settings: Mapping[str, object] | None = None,
    provenance: Provenance | None = None,
) -> Evaluation:
    """Accuracies, in percent, of a given head on features [S, W] of its kind (`classifier_input`).

    The classes of the head are 0 .. K - 1; with `class_ids` or `class_names` those of `val` are matched by them.
    `settings` join those of the rows. Raises `DataError` when features or labels do not fit the head.
    """
    n_classes, width = head.weight.shape
    if val.features.ndim != 2 or val.features.shape[1] != width:
        raise DataError(
            f"the head reads {width} features, but the images have {list(val.features.shape[1:])}; extract those of "
            f"{head.layers} layers and the mean patch of the backbone that the head was trained on"
        )
    if class_names is None and val.class_names is not None and len(val.class_names) == n_classes:
        class_names = val.class_names  # the set has all classes of the head, so that its numbers are the head's
    # Stands for the training set in the matching of classes: one row of each class.
    head_classes = Features(torch.zeros(n_classes, 1), torch.arange(n_classes), class_names, class_ids=class_ids)
    is_mapped = val.scoring is not None and val.scoring.class_mapping is not None
    largest = -1 if val.labels is None else int(val.labels.max())
    if not is_mapped and class_numbers(head_classes, val) is None and largest >= n_classes:
        raise DataError(
            f"there is a label {largest}, but the head has {n_classes} classes; give a class mapping, or class names"
        )
    task = match_classes(head_classes, val)
    require_finite(task.val_features, of="validation images")
    with torch.no_grad():
        blocks = task.val_features.split(_ROWS_AT_ONCE)
        logits = torch.cat([head(block.to(head.weight)).float().cpu() for block in blocks])
    rows, outcome = score_answers(
        task,
        task.answers.columns(logits).softmax(dim=1),
        method="linear",
        settings={"head": "given", "layers": head.layers, **(settings or {})},
        provenance=provenance,
    )
    return Evaluation(rows, {f"given head, {head.layers} layers": outcome})


def _score_head(
    heads: LinearHeads,
    number: int,
    sets: Sequence[tuple[str, ClassPredictions]],
    *,
    settings: Mapping[str, object],
    notes: Sequence[str],
    seed: int,
    started: float,
    provenance: Provenance | None,
) -> tuple[list[Result], dict[str, EvaluationOutcome]]:
    """Rows and outcomes of one head on the validation set, which has no name here, and on further sets."""
    rows: list[Result] = []
    outcomes: dict[str, EvaluationOutcome] = {}
    head = heads.table[number].name
    for name, task in sets:
        of_set: Provenance = {**(provenance or {}), "dataset": name} if name else provenance or {}
        logits = task.answers.columns(heads.head_logits(number, heads.columns.check(task.val_features)))
        set_rows, outcomes[f"{name}: {head}" if name else head] = score_answers(
            task,
            logits.softmax(dim=1),
            method="linear",
            settings=settings,
            notes=notes,
            seed=seed,
            seconds=time.perf_counter() - started,
            provenance=of_set,
        )
        rows += set_rows
    return rows, outcomes


class _Selection(NamedTuple):
    """Images that heads are compared on."""

    name: str
    features: Tensor
    targets: Tensor
    """Answers, where these are not all classes."""
    answers: Answers | None
    """None where all classes are answers in their order."""
    n_split: int = 0
    """Rows of the training features that were set aside."""
    notes: tuple[str, ...] = ()


def _selection(
    task: ClassPredictions, train: Features, select_on: str, live: LiveBatches | None, seed: int
) -> tuple[_Selection, Tensor]:  # and int64 [F]: the rows to train on
    everything = torch.arange(len(task.train_classes))
    if select_on == "val":
        note = "the head was chosen on the reported set itself, which flatters the figure"
        return _reported(task)._replace(notes=(note,)), everything
    if live is not None and live.held_out is not None:
        held_out = require_trainable(train, live.held_out)
        n = len(held_out.val_features)
        name = f"{n} of {n + (live.n_images or 0)} training images"
        return _reported(held_out)._replace(name=name), everything
    fitted, rows = stratified_split(task.train_classes, at_most=_HELD_OUT_AT_MOST, seed=seed)
    name = f"{len(rows)} of {len(task.train_classes)} training images"
    return _Selection(name, task.train_features[rows], task.train_classes[rows], None, len(rows)), fitted


def _reported(task: ClassPredictions) -> _Selection:
    return _Selection("reported set", task.val_features, task.answers.targets, task.answers)


def _cached(rows: Tensor, classes: Tensor, batch_size: int, seed: int) -> LiveBatches:
    identity = {"features": state_digest({"rows": rows, "classes": classes})}
    return LiveBatches(cached_batches(rows, classes, batch_size=batch_size, seed=seed), identity)


def _accuracies(heads: LinearHeads, selection: _Selection, metric: str) -> list[float]:
    """The selection figure of every head in percent, in the order of the table."""
    # Scores of all heads take far more room than the features, so images go through in blocks; predictions are kept.
    size = max(1, 32_000_000 // (len(heads.table) * heads.n_classes))
    values, answers = [], []
    for block in selection.features.split(size):
        logits = heads.logits(block)
        if selection.answers is not None:
            logits = selection.answers.columns(logits)
        best = logits.nan_to_num(nan=-torch.inf).max(dim=2)
        values.append(best.values)
        answers.append(best.indices)
    # A head that diverged says nothing: its answer is a class that no image has.
    predictions = torch.where(torch.cat(values, dim=1).isfinite(), torch.cat(answers, dim=1), heads.n_classes).cpu()
    return [
        100 * selection_accuracy(one_hot(of_head, heads.n_classes + 1).float(), selection.targets, metric=metric)
        for of_head in predictions
    ]


def _notes(settings: LinearSettings, live: LiveBatches | None, columns: TokenColumns) -> list[str]:
    notes = ["features were computed once: images were not augmented anew for each step"]
    if live is not None:
        notes = [live.note] if live.note else []
    full = PRESETS["release"]
    if settings != full:
        name = "preset short" if settings == PRESETS["short"] else "own settings"
        notes.append(
            f"{name}: {settings.n_iterations} iterations of {settings.batch_size} images and "
            f"{len(settings.learning_rates)} rates, where the release has {full.n_iterations} of {full.batch_size} and "
            f"{len(full.learning_rates)}"
        )
    if max(settings.n_last_blocks) > columns.n_blocks:
        notes.append(f"heads of {max(settings.n_last_blocks)} blocks read the {columns.n_blocks} that there are")
    if any(settings.avgpools) and not columns.pooled:
        notes.append("there are no patch tokens, so heads read class tokens alone")
    return notes
