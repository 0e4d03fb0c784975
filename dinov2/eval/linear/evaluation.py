"""The linear probe on cached features: train the whole grid, choose a head on held-out images, score it.

The public release reports the best of its heads on the very set that it scores. Here the head is chosen on images held
out of the training set; the release's figure is in the settings beside it, so that the optimism can be read off, and
becomes the reported one with `select_on="val"`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinov2.checkpoints.files import state_digest
from dinov2.encode.stream import Features
from dinov2.encode.tokens import require_finite
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError
from dinov2.eval.classes import Classification, match_classes
from dinov2.eval.linear.grid import PRESETS, LinearSettings, head_table
from dinov2.eval.linear.heads import LinearHeads
from dinov2.eval.linear.inputs import TokenColumns
from dinov2.eval.linear.training import Batches, cached_batches, train_heads
from dinov2.eval.log_regression.evaluation import METRICS
from dinov2.eval.log_regression.held_out import (
    require_trainable,
    selection_accuracy,
    stratified_split,
)
from dinov2.eval.outcome import Evaluation, Outcome
from dinov2.eval.result import Result
from dinov2.eval.scoring import scored

__all__ = ["LiveBatches", "evaluate_linear", "held_out_rows"]

_HELD_OUT_AT_MOST = 10_000
_WITHOUT_AUGMENTATION = "features were computed once: images were not augmented anew for each step"


@dataclass(frozen=True)
class LiveBatches:
    """Training batches that do not come from cached features.

    `batches` gives classes as positions among the ascending labels of the training set, and never an image of
    `held_out_rows`; `identity` says in plain values what they are made of (data set, augmentation, model, seed).
    """

    batches: Batches
    identity: Mapping[str, Any]
    note: str = ""
    """Joins the notes of the rows."""
    n_images: int | None = None
    """Different images that they are drawn from; None where `train` holds these very images."""


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
    provenance: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Top-1, top-5 and mean per class, in percent, of the best linear classifier of the grid.

    Args:
        columns: what the feature rows [S, W] are made of; None takes them as one class token of one block.
        preset: `release` for the release's protocol, `short` for one that a CPU can do; `settings` goes before it.
        select_on: choose the head on training images held out of the training, or on `val` as the release does.
        metric: one of the release's names; the head is chosen by top-1, or by its mean over classes.
        tests: further sets that the chosen head is scored on, and what to call them.
        live: trains on these batches in place of the rows of `train`, which then only serve to choose the head (and
            with `select_on="val"` to tell the classes, so that one row of each is enough).
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
    if metric not in METRICS:
        raise ConfigError(f"no metric is called {metric!r}; choose one of {', '.join(METRICS)}")
    if select_on not in ("split", "val"):
        raise ConfigError(f"a head is chosen on split or val, not on {select_on!r}")
    settings = PRESETS[preset] if settings is None else settings
    columns = TokenColumns(train.features.shape[1], 1, pooled=False) if columns is None else columns
    for features in (train, val, *(features for _, features in tests)):
        columns.rows(features.features)
    task = require_trainable(train, val)
    further = [(name, match_classes(train, features)) for name, features in tests]
    for name, one in further:
        require_finite(one.val_features, of=f"images of {name}")

    started = time.perf_counter()
    where = torch.device("cpu" if device is None else device)
    heads = LinearHeads(head_table(settings, columns), columns, n_classes=task.n_classes, device=where, seed=seed)
    fitted, held_out = torch.arange(len(task.train_classes)), torch.arange(0)
    if select_on == "split":
        fitted, held_out = stratified_split(task.train_classes, at_most=_HELD_OUT_AT_MOST, seed=seed)
    notes = _notes(settings, preset, live, columns)
    if select_on == "split":
        chosen_on = _Scored(task.train_features[held_out], task.train_classes[held_out])
        named = f"{len(held_out)} of {len(task.train_classes)} training images"
    else:
        chosen_on, named = _Scored.of(task), "reported set"
        notes.append("the head was chosen on the reported set itself, which flatters the figure")
    if live is None:
        rows, classes = task.train_features[fitted], task.train_classes[fitted]
        live = LiveBatches(
            cached_batches(rows, classes, batch_size=settings.batch_size, seed=seed),
            {"features": state_digest({"rows": rows, "classes": classes})},
        )

    curves: list[list[float]] = [[] for _ in heads.table]
    looks: list[int] = []

    def after(done: int, losses: Tensor) -> None:
        if on_step is not None:
            on_step(done, settings.n_iterations)
        if done % evaluate_every == 0 and done != settings.n_iterations:
            looks.append(done)
            for curve, value in zip(curves, _accuracies(heads, chosen_on, metric), strict=True):
                curve.append(100 * value)

    identity = {**live.identity, "batch_size": settings.batch_size, "seed": seed, "n_held_out": len(held_out)}
    began = train_heads(
        heads,
        live.batches,
        n_iterations=settings.n_iterations,
        momentum=settings.momentum,
        checkpoints=checkpoints,
        identity=identity,
        after=after,
    )
    if began:
        notes.append(f"training continued from iteration {began}")
    accuracies = _accuracies(heads, chosen_on, metric)
    best = max(range(len(accuracies)), key=accuracies.__getitem__)  # the first of equals, in the order of the grid
    if accuracies[best] == 0:
        notes.append("no head was right about a single image that heads are chosen on")
    on_reported = accuracies if select_on == "val" else _accuracies(heads, _Scored.of(task), metric)
    grid = [
        {
            "name": head.name,
            "release_name": head.release_name,
            "rate": head.rate,
            "selection": 100 * accuracies[i],
            "reported": 100 * on_reported[i],
        }
        for i, head in enumerate(heads.table)
    ]
    table: dict[str, Any] = {
        "head": heads.table[best].name,
        "rate": heads.table[best].rate,
        "selected_on": named,
        "selected_by": metric,
        "best_of_grid_on_reported": 100 * max(on_reported),
        "grid": grid,
        "curve": {"iterations": looks, "selection": curves[best]},
        "n_iterations": settings.n_iterations,
        "batch_size": settings.batch_size,
        "n_train": len(fitted) if live.n_images is None else live.n_images,
    }
    result_rows: list[Result] = []
    outcomes: dict[str, Outcome] = {}
    name_of_head = heads.table[best].name
    for name, one in (("", task), *further):
        fields = {**(provenance or {}), "seed": seed, **({"dataset": name} if name else {})}
        logits = one.answers.columns(heads.head_logits(best, columns.rows(one.val_features)))
        of_set, outcomes[f"{name}: {name_of_head}" if name else name_of_head] = scored(
            one,
            logits.softmax(dim=1),
            method="linear",
            settings=table,
            notes=tuple(notes),
            seconds=time.perf_counter() - started,
            **fields,
        )
        result_rows += of_set
    return Evaluation(result_rows, outcomes)


class _Scored(NamedTuple):
    """Images that heads are compared on."""

    features: Tensor
    targets: Tensor
    """Answers, where these are not all classes."""
    columns: Callable[[Tensor], Tensor] = lambda logits: logits
    """Of logits of all classes those of the answers."""

    @classmethod
    def of(cls, task: Classification) -> "_Scored":
        return cls(task.val_features, task.answers.targets, task.answers.columns)


def _accuracies(heads: LinearHeads, scored_on: _Scored, metric: str) -> list[float]:
    """The selection figure of every head, in the order of the table."""
    # Scores of all heads take far more room than the features, so images go through in blocks; predictions are kept.
    size = max(1, 32_000_000 // (len(heads.table) * heads.n_classes))
    values, found = [], []
    for block in scored_on.features.split(size):
        best = scored_on.columns(heads.logits(block)).nan_to_num(nan=-torch.inf).max(dim=2)
        values.append(best.values)
        found.append(best.indices)
    # A head that diverged says nothing: its answer is a class that no image has.
    predictions = torch.where(torch.cat(values, dim=1).isfinite(), torch.cat(found, dim=1), heads.n_classes).cpu()
    return [selection_accuracy(_one_hot(one, heads.n_classes), scored_on.targets, metric=metric) for one in predictions]


def _one_hot(predictions: Tensor, n_classes: int) -> Tensor:  # int64 [S], up to K -> [S, K + 1]
    return torch.nn.functional.one_hot(predictions, n_classes + 1).to(torch.float32)


def _notes(settings: LinearSettings, preset: str, live: LiveBatches | None, columns: TokenColumns) -> list[str]:
    notes = [_WITHOUT_AUGMENTATION] if live is None else [live.note] if live.note else []
    full = PRESETS["release"]
    if settings != full:
        named = "preset short" if settings == PRESETS["short"] else "own settings"
        notes.append(
            f"{named}: {settings.n_iterations} iterations of {settings.batch_size} images and "
            f"{len(settings.learning_rates)} rates, where the release has {full.n_iterations} of {full.batch_size} and "
            f"{len(full.learning_rates)}"
        )
    if max(settings.n_last_blocks) > columns.n_blocks:
        notes.append(f"heads of {max(settings.n_last_blocks)} blocks read the {columns.n_blocks} that there are")
    if any(settings.avgpools) and not columns.pooled:
        notes.append("there are no patch tokens, so heads read class tokens alone")
    return notes
