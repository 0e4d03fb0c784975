"""Linear classifiers on the features of any model: trained in one of two protocols, or there already.

`short` trains on features that were computed once, which a CPU can do. `release` is the protocol of the papers: each
step crops, flips and encodes its images anew, so that it takes as long as ten passes over ImageNet, or a GPU.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from dinov2.apps.evaluation.augmented import augmented_batches
from dinov2.apps.evaluation.datasets import EvaluationSets, NamedSet, labelled, split_rows
from dinov2.apps.evaluation.probes import ProbeReport
from dinov2.apps.evaluation.released_head import attach_head, mapped, read_class_mapping, score_head_on
from dinov2.apps.evaluation.session import Inputs, Session, session, with_split
from dinov2.apps.evaluation.subjects import PARTS, Subject
from dinov2.data.datasets.base import Subset, digest
from dinov2.distributed import barrier, is_main_process
from dinov2.encode.stream import Features
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError
from dinov2.eval.linear import PRESETS, LinearSettings, LiveBatches, TokenColumns, evaluate_linear
from dinov2.eval.linear.evaluate import held_out_rows
from dinov2.eval.outcome import Evaluation
from dinov2.eval.result import Result, write_results
from dinov2.file_lock import exclusive

__all__ = ["LINEAR_FILE", "PROTOCOLS", "columns_of", "linear"]

LINEAR_FILE = "results_eval_linear.json"

PROTOCOLS = ("short", "release")
"""Names of presets; `release` augments its images."""

_CHECKPOINTS = "linear_checkpoints"


def linear(
    inputs: Inputs,
    *,
    protocol: str = "short",
    settings: LinearSettings | None = None,
    select_on: Literal["split", "val"] = "split",
    metric: str = "mean_accuracy",
    classifier: str | None = None,
    test_datasets: Sequence[str] = (),
    class_mapping: str | None = None,
    test_class_mappings: Sequence[str | None] = (),
    evaluate_every: int = 1250,
    resume: bool = True,
    seed: int = 0,
) -> ProbeReport:
    """Trains a grid of classifiers, or scores the one that is there, and writes `results_eval_linear.json`.

    Nothing is trained when a `classifier` is given (a file, an address, a release's name), or no training images are
    and the model has one of its own (`dinov2_vits14_lc`). `settings` go before those of the protocol; class mappings
    are `.npy` files with the training class of each class of a set. A training of the protocol `release` continues
    where it stopped, when it is given the same output folder.

    Raises `ConfigError`, `DataError` or `WeightsError` for what is wrong, before the work where possible.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"no protocol of the linear probe is called {protocol!r}; choose {' or '.join(PROTOCOLS)}")
    if len(test_class_mappings) not in (0, len(test_datasets)):
        raise ConfigError(
            f"{len(test_class_mappings)} class mappings were given for {len(test_datasets)} test sets; give one for "
            "each, or None"
        )
    mappings = [None if file in (None, "None") else read_class_mapping(str(file)) for file in test_class_mappings]
    val_mapping = None if class_mapping is None else read_class_mapping(class_mapping)
    if inputs.features and protocol == "release":
        raise ConfigError("the protocol release crops its images anew; name --model and data sets, not --features")
    trains = classifier is None and bool(inputs.train_dataset or inputs.dataset or inputs.features)
    with session(inputs, task="linear", sets=None if trains else _scored_only(inputs)) as opened, ExitStack() as lock:
        if is_main_process():
            lock.enter_context(exclusive(opened.folder, "linear"))
        tests = [NamedSet(name, labelled(name)) for name in test_datasets]
        if trains:
            subject = opened.subject()
            job = _Job(opened, subject, protocol, settings or PRESETS[protocol], seed, resume)
            evaluation = job.run(
                tests,
                [val_mapping, *mappings],
                select_on=select_on,
                metric=metric,
                evaluate_every=evaluate_every,
            )
            rows = with_split(evaluation.rows, opened.sets)
        else:
            rows = _score(opened, classifier, tests, [val_mapping, *mappings])
            subject = opened.subject()
        if is_main_process():
            write_results(opened.folder / LINEAR_FILE, rows)
        unreadable = [] if trains and protocol == "release" else opened.unreadable(subject)
        return ProbeReport(rows, opened.folder, unreadable)


def columns_of(subject: Subject) -> tuple[TokenColumns, tuple[str, ...]]:
    """What the rows of a subject are made of, and the parts that they are."""
    parts = tuple(part for part in PARTS if part in subject.parts)
    return TokenColumns(subject.parts["cls"], subject.blocks, pooled="mean" in parts), parts


def _scored_only(inputs: Inputs) -> EvaluationSets:
    if not inputs.val_dataset:
        raise ConfigError("no images to score were named; give --val-dataset, and --train-dataset to train on")
    val = NamedSet(inputs.val_dataset, labelled(inputs.val_dataset))
    return EvaluationSets(val, val)


def _score(
    opened: Session, classifier: str | None, tests: Sequence[NamedSet], mappings: Sequence[Tensor | None]
) -> list[Result]:
    given: dict[str, Any] = {"classifier": opened.loaded.name}
    if classifier is not None:
        file = attach_head(opened.loaded, classifier, progress=opened.inputs.progress)
        given = {"classifier": file.name, "classifier_sha256": file.sha256}
    sets = [opened.sets.val, *tests]
    subject = opened.subject()
    found = score_head_on(opened.loaded, subject, sets, opened.bank, mappings=mappings, settings=given)
    return [row for evaluation in found.values() for row in evaluation.rows]


class _Job:
    """One training of the grid, by either protocol."""

    def __init__(
        self, opened: Session, subject: Subject, protocol: str, settings: LinearSettings, seed: int, resume: bool
    ) -> None:
        self.opened, self.subject, self.protocol, self.settings = opened, subject, protocol, settings
        self.seed, self.resume = seed, resume
        self.columns, self.parts = columns_of(subject)

    def run(
        self, tests: Sequence[NamedSet], mappings: Sequence[Tensor | None], *, select_on: Any, **options: Any
    ) -> Evaluation:
        chosen = [*mappings, *[None] * (1 + len(tests) - len(mappings))]
        common = {
            "columns": self.columns,
            "settings": self.settings,
            "on_step": self._on_step(),
            "device": self.subject.device,
            "seed": self.seed,
            "provenance": self.opened.provenance(self.subject),
            **options,
        }
        further = [
            (one.name, mapped(self._features(one), mapping)) for one, mapping in zip(tests, chosen[1:], strict=True)
        ]
        if self.protocol == "release":
            return self._augmented(further, chosen[0], select_on, common)
        train, val = self.opened.features(self.subject, parts=self.parts)
        return evaluate_linear(
            train,
            mapped(val, chosen[0]),
            preset=self.protocol,
            select_on=select_on,
            tests=further,
            **common,
        )

    def _augmented(
        self,
        tests: Sequence[tuple[str, Features]],
        mapping: Tensor | None,
        select_on: Literal["split", "val"],
        common: dict[str, Any],
    ) -> Evaluation:
        """Features are only needed of the images that heads are chosen and scored on, so no pass over the rest."""
        sets, subject = self.opened.sets, self.subject
        labels = torch.as_tensor(sets.train.images.get_targets(), dtype=torch.int64)
        rows = (labels >= 0).nonzero().squeeze(1) if sets.split is None else split_rows(sets.train.images)[0]
        known, classes = labels[rows].unique(return_inverse=True)
        val = self._features(sets.val)
        if sets.split is not None:
            val = sets.divided(val, val)[1]
        val = mapped(val, mapping)
        held_out = held_out_rows(classes, seed=self.seed) if select_on == "split" else torch.arange(0)
        fitted = torch.ones(len(rows), dtype=torch.bool)
        fitted[held_out] = False
        live = LiveBatches(
            augmented_batches(
                sets.train.images,
                rows[fitted],
                classes[fitted],
                subject,
                batch_size=self.settings.batch_size,
                num_workers=self.opened.inputs.num_workers,
                seed=self.seed,
            ),
            {
                "images": sets.train.identity()["images"],
                "rows": digest(rows[fitted].numpy()),
                "model": subject.identity["weights"],
                "transform": subject.transform.describe(),
                "precision": subject.precision,
                "augmentation": 1,
            },
            n_images=int(fitted.sum()),
            held_out=self._features(self._part(sets.train, rows[held_out])) if len(held_out) else None,
        )
        # Batches bring their own images: of the training set no more is needed than one row of each class.
        classes_only = Features(
            torch.zeros(len(known), self.columns.width),
            known,
            sets.train.class_names,
            class_ids=sets.train.class_ids,
        )
        return evaluate_linear(
            classes_only, val, tests=tests, live=live, checkpoints=self._checkpoints(), select_on=select_on, **common
        )

    def _features(self, images: NamedSet) -> Features:
        return self.opened.bank.features(self.subject, images, parts=self.parts)

    def _part(self, whole: NamedSet, rows: Tensor) -> NamedSet:
        return NamedSet(f"{whole.name} ({len(rows)} held out)", Subset(whole.images, rows.numpy()))

    def _checkpoints(self) -> CheckpointStore:
        folder = self.opened.folder / _CHECKPOINTS
        if not self.resume:
            if is_main_process():
                shutil.rmtree(folder, ignore_errors=True)
            barrier()
        return CheckpointStore(folder, keep=1)

    def _on_step(self) -> Callable[[int, int], None] | None:
        return self.opened.inputs.progress(f"{self.subject.name}: linear classifiers")
