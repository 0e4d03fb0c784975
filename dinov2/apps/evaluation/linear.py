"""Linear classifiers on the features of any model: trained in one of two protocols, or there already.

`short` trains on features that were computed once, which a CPU can do. `release` is the protocol of the papers: each
step crops, flips and encodes its images anew, so that it takes as long as ten passes over ImageNet, or a GPU. Which
image is sample i of such a training, and its crop, are functions of the seed and i alone, whatever the workers,
processes and restarts.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.apps.evaluation.context import EvalConfig, EvalContext, EvaluationReport, open_evaluation
from dinov2.apps.evaluation.datasets import LabelledDataset, labelled, split_rows
from dinov2.apps.evaluation.features import FeatureExtractor
from dinov2.apps.evaluation.heads import attach_head, mapped, read_class_mapping, score_head_on
from dinov2.apps.evaluation.protocols import token_columns
from dinov2.data.datasets.base import ImageDataset, Subset, digest
from dinov2.data.eval_transform import make_classification_train_transform
from dinov2.data.stream import SampleStream, hash_keys
from dinov2.encode.stream import Features
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DataError
from dinov2.eval.linear import PRESETS, LinearSettings, LiveBatches, evaluate_linear
from dinov2.eval.linear.evaluate import held_out_rows
from dinov2.eval.linear.training import Batches
from dinov2.eval.result import Result, write_results
from dinov2.file_lock import lock_folder

__all__ = ["augmented_batches", "linear"]

_RESULTS_FILE = "results_eval_linear.json"
_CHECKPOINTS = "linear_checkpoints"
_ATTEMPTS = 10


def linear(
    config: EvalConfig,
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
) -> EvaluationReport:
    """Train a grid of classifiers, or score the one that is there, and write `results_eval_linear.json`.

    Nothing is trained when a `classifier` is given (a file, an address, a release's name), or no training images are
    and the model has one of its own (`dinov2_vits14_lc`). `settings` go before those of the protocol; class mappings
    are `.npy` files with the training class of each class of a set. A training of the protocol `release` continues
    where it stopped, when it is given the same output folder.

    Raises `ConfigError`, `DataError` or `WeightsError` for what is wrong, before the work where possible.
    """
    if protocol not in PRESETS:
        raise ConfigError(f"no protocol of the linear probe is called {protocol!r}; choose short or release")
    if len(test_class_mappings) not in (0, len(test_datasets)):
        raise ConfigError(
            f"{len(test_class_mappings)} class mappings were given for {len(test_datasets)} test sets; give one for "
            "each, or None"
        )
    files = [class_mapping, *(test_class_mappings or [None] * len(test_datasets))]
    mappings = [None if file in (None, "None") else read_class_mapping(str(file)) for file in files]
    if config.features and protocol == "release":
        raise ConfigError("the protocol release crops its images anew; name --model and data sets, not --features")
    trains = classifier is None and bool(config.train_dataset or config.dataset or config.features)
    sets = None if trains else config.scored_only()
    with open_evaluation(config, task="linear", sets=sets) as context, ExitStack() as lock:
        if distributed.is_main_process():
            lock.enter_context(lock_folder(context.folder, "linear"))
        tests = [LabelledDataset(name, labelled(name)) for name in test_datasets]
        unreadable: list[tuple[str, str]] = []
        if trains:
            extractor = context.extractor()
            columns, parts = token_columns(extractor)
            settings = settings or PRESETS[protocol]
            live = checkpoints = None
            if protocol == "short":
                train, val = context.features(extractor, parts=parts)
            else:
                # Batches bring their own images: features are needed of those that heads are chosen and scored on, and
                # of the training set no more than one row of each class.
                live = _live_batches(context, extractor, settings, parts, held_out=select_on == "split", seed=seed)
                train = _one_row_of_each_class(context.sets.train, columns.width)
                val = context.cache.features(extractor, context.sets.val, parts=parts)
                val = val if context.sets.split is None else context.sets.divided(val, val)[1]
                checkpoints = _checkpoints(context, resume)
            evaluation = evaluate_linear(
                train,
                mapped(val, mappings[0]),
                columns=columns,
                preset=protocol,
                settings=settings,
                select_on=select_on,
                metric=metric,
                tests=[
                    (test.name, mapped(context.cache.features(extractor, test, parts=parts), mapping))
                    for test, mapping in zip(tests, mappings[1:], strict=True)
                ],
                live=live,
                checkpoints=checkpoints,
                evaluate_every=evaluate_every,
                on_step=config.progress(f"{extractor.name}: linear classifiers"),
                device=extractor.device,
                seed=seed,
                provenance=context.provenance(extractor),
            )
            rows = context.with_split(evaluation.rows)
            if protocol == "short":
                unreadable = context.unreadable(extractor)
        else:
            rows = _score(context, classifier, tests, mappings)
            unreadable = context.unreadable(context.extractor())
        if distributed.is_main_process():
            write_results(context.folder / _RESULTS_FILE, rows)
        return EvaluationReport(rows, context.folder, unreadable)


def augmented_batches(
    images: ImageDataset,
    rows: Tensor,  # int64 [F]
    classes: Tensor,  # int64 [F]
    extractor: FeatureExtractor,
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
) -> Batches:
    """Batches of `batch_size` images of all processes together, drawn among `rows` of `images`, as columns.

    An image that cannot be read is replaced by another one; ten in a row are a `DataError`.
    """
    dataset = _AugmentedImages(images, rows, classes, extractor, seed=seed)

    def batches(first: int) -> Iterable[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=_Samples(first, batch_size),
            num_workers=num_workers,
            pin_memory=extractor.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )
        for pixels, targets in loader:
            # Outside inference mode the columns are plain tensors again.
            yield extractor.columns(pixels.to(extractor.device, non_blocking=True)).clone(), targets

    return batches


def _score(
    context: EvalContext,
    classifier: str | None,
    tests: Sequence[LabelledDataset],
    mappings: Sequence[Tensor | None],
) -> list[Result]:
    settings = {"classifier": context.loaded.name}
    if classifier is not None:
        file = attach_head(context.loaded, classifier, progress=context.config.progress)
        settings = {"classifier": file.name, "classifier_sha256": file.sha256}
    sets = [context.sets.val, *tests]
    scored = score_head_on(
        context.loaded, context.extractor(), sets, context.cache, mappings=mappings, settings=settings
    )
    return [row for evaluation in scored.values() for row in evaluation.rows]


def _live_batches(
    context: EvalContext,
    extractor: FeatureExtractor,
    settings: LinearSettings,
    parts: Sequence[str],
    *,
    held_out: bool,
    seed: int,
) -> LiveBatches:
    """Batches of augmented training images, without those that are held out to choose a head on."""
    train = context.sets.train
    labels = torch.as_tensor(train.images.get_targets(), dtype=torch.int64)
    rows = (labels >= 0).nonzero().squeeze(1) if context.sets.split is None else split_rows(train.images)[0]
    classes = labels[rows].unique(return_inverse=True)[1]
    chosen = held_out_rows(classes, seed=seed) if held_out else torch.arange(0)
    fitted = torch.ones(len(rows), dtype=torch.bool)
    fitted[chosen] = False
    selection = None
    if held_out:
        subset = Subset(train.images, rows[chosen].numpy())
        name = f"{train.name} ({len(chosen)} held out)"
        selection = context.cache.features(extractor, LabelledDataset(name, subset), parts=parts)
    identity = {
        "images": train.identity()["images"],
        "rows": digest(rows[fitted].numpy()),
        "model": extractor.identity["weights"],
        "transform": extractor.transform.describe(),
        "precision": extractor.precision,
        "augmentation": 1,
    }
    batches = augmented_batches(
        train.images,
        rows[fitted],
        classes[fitted],
        extractor,
        batch_size=settings.batch_size,
        num_workers=context.config.num_workers,
        seed=seed,
    )
    return LiveBatches(batches, identity, n_images=int(fitted.sum()), held_out=selection)


def _one_row_of_each_class(train: LabelledDataset, width: int) -> Features:
    labels = torch.as_tensor(train.images.get_targets(), dtype=torch.int64)
    classes = labels[labels >= 0].unique()
    return Features(torch.zeros(len(classes), width), classes, train.class_names, class_ids=train.class_ids)


def _checkpoints(context: EvalContext, resume: bool) -> CheckpointStore:
    folder = context.folder / _CHECKPOINTS
    if not resume:
        if distributed.is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
        distributed.barrier()
    return CheckpointStore(folder, keep=1)


class _AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Sample i of the stream over the given images: a random crop `[C, H, H]` and its class."""

    def __init__(
        self, images: ImageDataset, rows: Tensor, classes: Tensor, extractor: FeatureExtractor, *, seed: int
    ) -> None:
        self.images, self.rows, self.classes, self.seed = images, rows.tolist(), classes.tolist(), seed
        self.stream, self.channels = SampleStream(len(self.rows), seed), extractor.channels
        transform = extractor.transform
        self.transform = make_classification_train_transform(
            crop_size=transform.crop_size, mean=transform.mean, std=transform.std
        )

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        position, failure = int(self.stream.index_of(sample)), None
        for attempt in range(_ATTEMPTS):
            index = self.rows[position]
            try:
                image = (
                    self.images.get_image(index)
                    if self.channels == 3
                    else self.images.get_tensor(index, channels=self.channels)
                )
            except (DataError, OSError) as error:
                failure = error
                position = self.stream.substitute(sample, attempt + 1)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(hash_keys(self.seed, "augmentation", sample) >> np.uint64(1)))
                return self.transform(image), self.classes[position]
        raise DataError(f"{_ATTEMPTS} images in a row could not be read, the last: {failure}") from failure


class _Samples:
    """Sample numbers of this process, batch by batch, from an iteration on and without end."""

    def __init__(self, first: int, batch_size: int) -> None:
        self.first, self.batch_size = first, batch_size
        rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
        self.share = range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)

    def __iter__(self) -> Iterator[list[int]]:
        iteration = self.first
        while True:
            yield [iteration * self.batch_size + number for number in self.share]
            iteration += 1
