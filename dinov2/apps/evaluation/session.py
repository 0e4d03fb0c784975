"""What every evaluation is told, and what is there once all of it was looked at: folder, model, images, features.

Everything that can be wrong is found before features are extracted, which may take hours.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dinov2.apps.evaluation.datasets import EvaluationSets, NamedSet, open_sets
from dinov2.apps.evaluation.features import FeatureCache, cache_for
from dinov2.apps.evaluation.processes import Say, joined, shared_folder
from dinov2.apps.evaluation.stored import StoredCache, open_stored
from dinov2.apps.evaluation.subjects import Subject, subject_of, with_size
from dinov2.checkpoints.locate import ShowProgress
from dinov2.configs import load_config
from dinov2.distributed import is_main_process
from dinov2.encode.stream import Features
from dinov2.engine.parallel import autocast, choose_device
from dinov2.engine.threads import fastest_threads, sample_of
from dinov2.errors import ConfigError
from dinov2.eval.result import Result
from dinov2.eval.scoring import Provenance
from dinov2.pretrained import Pretrained, load

__all__ = ["Inputs", "Session", "load_model", "model_threads", "session", "with_split"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments that all evaluations share."""

    model: str | os.PathLike[str] = ""
    """Whatever `dinov2.load` knows."""
    features: Sequence[str] = ()
    """In place of a model: one file that `dinov2 embed` wrote, which is split, or two, to learn from and to score."""
    train_dataset: str | None = None
    val_dataset: str | None = None
    dataset: str | None = None
    """One set to be split; so is a training set without a validation set."""
    output_dir: str | os.PathLike[str] | None = None
    config_file: str | None = None
    overrides: Sequence[str] = ()
    resolution: int | None = None
    """Side of the crop that the model sees, in pixels; None is the model's own."""
    resize: int | None = None
    """Shorter side before the crop, in pixels; None is 256/224 of the crop."""
    resize_to_crop: bool = False
    """Resize the shorter side to the crop itself, as the release does for logistic regression."""
    cache_dir: str | os.PathLike[str] | None = None
    use_cache: bool = True
    batch_size: int = 256
    num_workers: int = 0
    threads: int = 0
    """Threads on the CPU; 0 takes one or all, whichever is faster at the start."""
    device: str = "auto"
    precision: str = "auto"
    say: Say = lambda text: None
    progress: ShowProgress = lambda label: None


@dataclass(frozen=True)
class Session:
    """An evaluation that may begin."""

    inputs: Inputs
    folder: Path
    """Where results go; it is not made before there are some."""
    model: Pretrained | None
    """None where features were named in its place."""
    sets: EvaluationSets
    bank: FeatureCache | StoredCache
    stored: Subject | None = None

    @property
    def loaded(self) -> Pretrained:
        """The model. Raises `ConfigError` where features were named in its place."""
        if self.model is None:
            raise ConfigError("this needs a model and images; name --model in place of --features")
        return self.model

    def subject(self) -> Subject:
        """What is evaluated: the model, or the features that were named."""
        return self.stored or subject_of(self.loaded)

    def features(self, subject: Subject, *, parts: Sequence[str] = ("cls",)) -> tuple[Features, Features]:
        """Features of the training and of the validation images."""
        return self.sets.divided(*(self.bank.features(subject, images, parts=parts) for images in self.image_sets))

    def unreadable(self, subject: Subject) -> list[tuple[str, str]]:
        """(path, reason) of every image that was left out."""
        images = (self.sets.train, self.sets.val) if self.sets.split is None else (self.sets.train,)
        return [failure for one in images for failure in self.bank.features(subject, one).unreadable]

    def provenance(self, subject: Subject) -> Provenance:
        """The fields of a result row that do not depend on the method."""
        return {
            "dataset": self.sets.val.name,
            "split": "" if self.sets.split is None else "held out",
            "model": subject.described,
            "transform": subject.transform.describe(),
            "precision": subject.precision,
        }

    @property
    def image_sets(self) -> tuple[NamedSet, NamedSet]:
        """The training and the validation set; one and the same where it is split."""
        return self.sets.train, self.sets.val


@contextmanager
def session(inputs: Inputs, *, task: str, sets: EvaluationSets | None = None) -> Iterator[Session]:
    """Opens everything, in one process or all that were launched together; without an output folder a new one is named.

    `sets` are images that an earlier session has opened.

    Raises `ConfigError`, `DataError` or `WeightsError` for what is wrong.
    """
    if inputs.features:
        if inputs.model:
            raise ConfigError("a model and features were named; the features are of a model, so leave --model out")
        names = (inputs.train_dataset or inputs.dataset, inputs.val_dataset)
        with joined():
            subject, sets = open_stored(inputs.features, names, choose_device(inputs.device))
            folder = shared_folder(inputs.output_dir, task=task)
            yield Session(inputs, folder, None, sets, StoredCache(), subject)
        return
    if not inputs.model:
        raise ConfigError(
            "no model was named; give a release's name, a weight file or a run's folder, or --features that "
            "`dinov2 embed` wrote"
        )
    bank = FeatureCache(
        cache_for(inputs.cache_dir, use=inputs.use_cache), inputs.batch_size, inputs.num_workers, inputs.progress
    )
    with joined():
        folder = shared_folder(inputs.output_dir, task=task)
        loaded = load_model(inputs)
        known = sets is not None
        sets = sets or open_sets(inputs.train_dataset, inputs.val_dataset, inputs.dataset)
        if is_main_process():
            inputs.say(loaded.source if loaded.report is None else f"{loaded.source}: {loaded.report}")
            if sets.split is not None and not known:
                inputs.say(
                    f"{sets.train.name}: split by name, {sets.split['n_train']:,} images to train and "
                    f"{sets.split['n_val']:,} to score on"
                )
        with model_threads(loaded, inputs.threads):
            yield Session(inputs, folder, loaded, sets, bank)


def load_model(inputs: Inputs) -> Pretrained:
    """The model with images of the size that was asked for."""
    configured = inputs.config_file or inputs.overrides
    cfg = load_config(inputs.config_file, inputs.overrides) if configured else None
    loaded = load(
        inputs.model,
        cfg=cfg,
        device=choose_device(inputs.device),
        precision=inputs.precision,
        progress=inputs.progress,
    )
    resize = inputs.resize
    if inputs.resize_to_crop:
        resize = inputs.resolution or loaded.transform.crop_size
    return with_size(loaded, resolution=inputs.resolution, resize=resize)


def model_threads(loaded: Pretrained, threads: int) -> AbstractContextManager[None]:
    """While entered, the CPU threads that were asked for, or with 0 those with which the model is faster now."""
    backbone: Any = loaded.backbone
    channels = int(getattr(getattr(backbone, "patch_embed", None), "in_chans", 3))
    images = sample_of(backbone, channels=channels, side=loaded.transform.crop_size, patch_size=loaded.patch_size)

    def forward() -> object:
        with torch.inference_mode(), autocast(loaded.device, loaded.autocast_dtype):
            return backbone(images)

    return fastest_threads(forward, device=loaded.device, threads=threads)


def with_split(rows: Sequence[Result], sets: EvaluationSets) -> list[Result]:
    """The rows with a note of how one set was split."""
    if sets.split is None:
        return list(rows)
    return [replace(row, settings={**row.settings, "split": sets.split}) for row in rows]
