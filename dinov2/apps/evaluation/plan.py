"""Plan of an evaluation: images, classes, features at hand, and the time that the model takes for the rest."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dinov2.apps.evaluation.context import EvalConfig, open_evaluation
from dinov2.apps.evaluation.datasets import LabelledDataset, labelled
from dinov2.apps.evaluation.features import FeatureCache, FeatureExtractor, feature_extractor
from dinov2.apps.evaluation.heads import attach_head, score_head_on
from dinov2.apps.evaluation.stored import StoredCache

__all__ = ["evaluation_plan", "plan_lines"]

_SYNTHETIC = 64


def evaluation_plan(
    config: EvalConfig,
    *,
    task: str,
    models: Sequence[str | os.PathLike[str]] = (),
    parts: Sequence[str] | None = ("cls",),
    further: Sequence[str] = (),
    trains: bool = True,
    classifier: str | None = None,
    augmented: int = 0,
) -> list[str]:
    """Lines that say what `task` would do; nothing is written, and the model sees synthetic images only.

    Args:
        models: those that are compared; none is the one of `config`.
        parts: what the task reads of the features; None is all.
        further: labelled data sets besides those of `config`.
        trains: whether it learns from images; else it scores a `classifier`, or the one that the model brings.
        augmented: training images that go through the model one by one, cropped anew each time.

    Raises what the evaluation itself would raise before its work.
    """
    if config.features:
        with open_evaluation(config, task=task) as context:
            train, val = context.features(context.extractor())
            read = f"{len(train):,} rows of features to learn from and {len(val):,} to score on are there"
            return [read, _ending(context.folder)]
    lines: list[str] = []
    sets = None if trains else config.scored_only()
    tests = [LabelledDataset(name, labelled(name)) for name in further]
    folder = Path()
    for number, model in enumerate(models or [config.model]):
        with open_evaluation(replace(config, model=model), task=task, sets=sets) as context:
            sets = context.sets
            folder = context.folder if number == 0 else folder
            images = [sets.val, *tests] if augmented else [sets.train, sets.val, *tests]
            extractor = feature_extractor(context.loaded)
            if not trains:
                if classifier is not None:
                    attach_head(context.loaded, classifier, progress=config.progress)
                score_head_on(context.loaded, extractor, [], context.cache)  # raises for what is missing
            lines += plan_lines(extractor, context.cache, images, parts=parts, augmented=augmented)
    return [*lines, _ending(folder)]


def plan_lines(
    extractor: FeatureExtractor,
    cache: FeatureCache | StoredCache,
    images: Iterable[LabelledDataset],
    *,
    parts: Sequence[str] | None = ("cls",),
    augmented: int = 0,
    folder: Path | None = None,
) -> list[str]:
    """Work of one model on those images, and the time for the ones whose features are not at hand.

    `folder` is where results would go, if that is to be the last line.
    """
    speed = _images_a_second(extractor, cache.batch_size)
    lines = [
        f"{extractor.name}: {sum(extractor.parts.values())} columns ({', '.join(extractor.parts)}) in "
        f"{extractor.precision} on {extractor.device}, {speed:,.1f} synthetic images of "
        f"{extractor.transform.crop_size} pixels a second"
    ]
    waiting = augmented
    for named in dict.fromkeys(images):
        kept = cache.is_kept(extractor, named, parts=parts or list(extractor.parts))
        waiting += 0 if kept else len(named.images)
        lines.append(_describe(named, kept=kept))
    if augmented:
        lines.append(f"training takes {augmented:,} images, cropped and encoded anew each time")
    if waiting:
        lines.append(f"the model needs about {_duration(waiting / speed)} for {waiting:,} images, decoding apart")
    return lines if folder is None else [*lines, _ending(folder)]


def _ending(folder: Path) -> str:
    return f"results would be in {folder}; nothing was written"


def _describe(named: LabelledDataset, *, kept: bool) -> str:
    targets = named.images.get_targets()
    classes = ""
    if targets is not None:
        labels = torch.as_tensor(targets)
        classes = f" of {len(labels[labels >= 0].unique()):,} classes"
    state = "features are in the cache" if kept else "features have to be extracted"
    return f"{named.name}: {len(named.images):,} images{classes}, {state}"


def _images_a_second(extractor: FeatureExtractor, batch_size: int) -> float:
    size = extractor.transform.crop_size
    images = torch.randn(min(_SYNTHETIC, batch_size), extractor.channels, size, size, device=extractor.device)
    rounds = -(-_SYNTHETIC // len(images))
    extractor.columns(images)  # the first pass prepares
    started = time.perf_counter()
    for _ in range(rounds):
        extractor.columns(images).cpu()  # waits for the device
    return rounds * len(images) / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
