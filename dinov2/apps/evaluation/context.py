"""Inputs of every evaluation, and the opened folder, model, images and features.

Everything that can be wrong is found before features are extracted, which may take hours. An evaluation runs in one
process or in all those that torchrun or SLURM started together.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dinov2 import distributed
from dinov2.apps.evaluation.datasets import EvaluationSets, LabelledDataset, labelled, open_sets
from dinov2.apps.evaluation.features import FeatureCache, FeatureExtractor, cache_for, feature_extractor, with_size
from dinov2.apps.evaluation.stored import StoredCache, open_stored
from dinov2.apps.places import output_folder
from dinov2.checkpoints.locate import ShowProgress
from dinov2.configs import load_config
from dinov2.encode.stream import Features
from dinov2.engine.parallel import autocast, choose_device
from dinov2.engine.threads import fastest_threads, sample_of
from dinov2.errors import ConfigError
from dinov2.eval.result import Result
from dinov2.eval.scoring import Provenance
from dinov2.pretrained import Pretrained, load

__all__ = ["EvalConfig", "EvalContext", "EvaluationReport", "open_evaluation"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The arguments that all evaluations share."""

    model: str | os.PathLike[str] = ""
    """Anything that `dinov2.load` takes."""
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
    say: Callable[[str], None] = lambda text: None
    """Print a line for the user, in the main process."""
    progress: ShowProgress = lambda label: None

    def scored_only(self) -> EvaluationSets:
        """The validation set alone. Raises `ConfigError` when none was named."""
        if not self.val_dataset:
            raise ConfigError("no images to score were named; give --val-dataset, and --train-dataset to train on")
        val = LabelledDataset(self.val_dataset, labelled(self.val_dataset))
        return EvaluationSets(val, val)


@dataclass
class EvaluationReport:
    """The rows of an evaluation, and where they were written."""

    rows: list[Result]
    output_dir: Path
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of every image that was left out."""
    baselines: dict[str, list[Result]] = field(default_factory=dict)
    """Rows of `untrained` and `raw_pixels`, where they were asked for."""

    def value(self, metric: str = "top-1") -> float:
        """The first figure of that name, in percent."""
        return next(row.value for row in self.rows if row.metric == metric)

    def best_top1(self, name: str = "trained") -> float:
        """Highest top-1 of `trained`, `raw_pixels` or `untrained`, in percent."""
        rows = self.rows if name == "trained" else self.baselines[name]
        return max(row.value for row in rows if row.metric == "top-1")


@dataclass(frozen=True)
class EvalContext:
    """An evaluation that may begin."""

    config: EvalConfig
    folder: Path
    """Folder of the results; it is not made before there are some."""
    model: Pretrained | None
    """None where features were named in its place."""
    sets: EvaluationSets
    cache: FeatureCache | StoredCache
    stored: FeatureExtractor | None = None

    @property
    def loaded(self) -> Pretrained:
        """The model. Raises `ConfigError` where features were named in its place."""
        if self.model is None:
            raise ConfigError("this needs a model and images; name --model in place of --features")
        return self.model

    def extractor(self) -> FeatureExtractor:
        """The extractor that is evaluated: that of the model, or of the features that were named."""
        return self.stored or feature_extractor(self.loaded)

    def features(self, extractor: FeatureExtractor, *, parts: Sequence[str] = ("cls",)) -> tuple[Features, Features]:
        """Features of the training and of the validation images."""
        images = (self.sets.train, self.sets.val)
        return self.sets.divided(*(self.cache.features(extractor, one, parts=parts) for one in images))

    def unreadable(self, extractor: FeatureExtractor) -> list[tuple[str, str]]:
        """(path, reason) of every image that was left out."""
        images = (self.sets.train, self.sets.val) if self.sets.split is None else (self.sets.train,)
        return [failure for one in images for failure in self.cache.features(extractor, one).unreadable]

    def provenance(self, extractor: FeatureExtractor) -> Provenance:
        """Fields of a result row that do not depend on the method."""
        return extractor.provenance(self.sets.val.name, split="" if self.sets.split is None else "held out")

    def with_split(self, rows: Sequence[Result]) -> list[Result]:
        """The rows with a note of how one set was split."""
        if self.sets.split is None:
            return list(rows)
        return [replace(row, settings={**row.settings, "split": self.sets.split}) for row in rows]

    def say(self, text: str) -> None:
        """A line for the user, from the main process."""
        if distributed.is_main_process():
            self.config.say(text)


@contextmanager
def open_evaluation(config: EvalConfig, *, task: str, sets: EvaluationSets | None = None) -> Iterator[EvalContext]:
    """Open everything, in one process or all that were launched together; without an output folder a new one is named.

    `sets` are images that are open already.

    Raises `ConfigError`, `DataError` or `WeightsError` for what is wrong.
    """
    if config.features:
        if config.model:
            raise ConfigError("a model and features were named; the features are of a model, so leave --model out")
        names = (config.train_dataset or config.dataset, config.val_dataset)
        with _joined():
            extractor, sets = open_stored(config.features, names, choose_device(config.device))
            yield EvalContext(config, _shared_folder(config, task), None, sets, StoredCache(), extractor)
        return
    if not config.model:
        raise ConfigError(
            "no model was named; give a release's name, a weight file or a run's folder, or --features that "
            "`dinov2 embed` wrote"
        )
    cache = FeatureCache(
        cache_for(config.cache_dir, use=config.use_cache), config.batch_size, config.num_workers, config.progress
    )
    with _joined():
        folder = _shared_folder(config, task)
        loaded = _load_model(config)
        is_open = sets is not None
        sets = sets or open_sets(config.train_dataset, config.val_dataset, config.dataset)
        context = EvalContext(config, folder, loaded, sets, cache)
        context.say(loaded.source if loaded.report is None else f"{loaded.source}: {loaded.report}")
        if sets.split is not None and not is_open:
            context.say(
                f"{sets.train.name}: split by name, {sets.split['n_train']:,} images to train and "
                f"{sets.split['n_val']:,} to score on"
            )
        with _model_threads(loaded, config.threads):
            yield context


def _load_model(config: EvalConfig) -> Pretrained:
    """The model with images of the size that was asked for."""
    configured = config.config_file or config.overrides
    loaded = load(
        config.model,
        cfg=load_config(config.config_file, config.overrides) if configured else None,
        device=choose_device(config.device),
        precision=config.precision,
        progress=config.progress,
    )
    resize = (config.resolution or loaded.transform.crop_size) if config.resize_to_crop else config.resize
    return with_size(loaded, resolution=config.resolution, resize=resize)


def _model_threads(loaded: Pretrained, threads: int) -> AbstractContextManager[None]:
    """While entered, the CPU threads that were asked for, or with 0 those with which the model is faster now."""
    backbone = loaded.backbone
    channels = int(getattr(getattr(backbone, "patch_embed", None), "in_chans", 3))
    images = sample_of(backbone, channels=channels, side=loaded.transform.crop_size, patch_size=loaded.patch_size)

    def forward() -> object:
        with torch.inference_mode(), autocast(loaded.device, loaded.autocast_dtype):
            return backbone(images)

    return fastest_threads(forward, device=loaded.device, threads=threads)


@contextmanager
def _joined() -> Iterator[None]:
    """Inside, this process is one of those that were launched together; nothing happens where it is the only one.

    The group stays until the process ends, so that whoever reports afterwards knows which one speaks.
    """
    # Other variables, such as a port that a shell exports for later, do not make a process one of several.
    launched = os.environ.get("WORLD_SIZE", "1") != "1" or "SLURM_PROCID" in os.environ
    if launched and not distributed.is_enabled():
        distributed.enable()
    yield
    distributed.barrier()


def _shared_folder(config: EvalConfig, task: str) -> Path:
    """The output folder, the same for all processes although each looks at its own clock."""
    return Path(distributed.broadcast_object(str(output_folder(config.output_dir, task=task))))
