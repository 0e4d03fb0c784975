"""Self-supervised training from plain arguments, with evaluations on the way where data sets for them are named."""

import logging
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from dinov2.apps.pictures import picture_evaluation
from dinov2.apps.places import output_folder
from dinov2.apps.training_evaluations import accuracy_evaluation
from dinov2.configs import Config, load_config, to_yaml
from dinov2.data.loaders import parse_dataset_str
from dinov2.engine.run_folder import RunFolder
from dinov2.errors import ConfigError
from dinov2.train.monitoring import summary
from dinov2.train.setup import Training, build_training
from dinov2.train.train import Evaluate, Outcome, train

__all__ = ["check_training", "outcome_line", "run_training", "training_config"]

_LOG = logging.getLogger("dinov2")


def training_config(
    *,
    data: str | None = None,
    preset: str | None = None,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The configuration of a training: defaults, then preset or file, then overrides, then `data`.

    Raises `ConfigError` when something is wrong in it, or when no images were named at all.
    """
    # An empty name comes from an unset variable in a script; the default in its place would be a surprise of days.
    for what, given in (("data", data), ("preset", preset), ("config file", config_file)):
        if given == "":
            raise ConfigError(f"the name of the {what} is empty; write a name, or leave the option out")
    if preset and config_file:
        raise ConfigError("a preset and a config file were both given; put the file's keys behind the preset instead")
    extra = [f"train.dataset_path={data}"] if data is not None else []
    cfg = load_config(config_file, [*overrides, *extra], preset=preset)
    if data is None and cfg.train.dataset_path == Config().train.dataset_path:  # names a data set, but not where it is
        raise ConfigError("no images were named; add --data DIR, or --preset toy to train on built-in pictures")
    return cfg


def run_training(
    cfg: Config,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    max_steps: int | None = None,
    resume: bool = True,
    refuse_excess: bool = False,
    evaluations: Sequence[Evaluate] = (),
    announce: Callable[[str], None] = _LOG.info,
) -> tuple[Path, Outcome]:
    """Trains and returns the run's folder; without `output_dir` that is a new one under `runs/`.

    Where a teacher is exported, `evaluations` are called; none given, its patch features are drawn for the report.
    """
    folder = _outside_images(output_folder(output_dir, task="train"), cfg)
    calls = [*evaluations] or [picture_evaluation()]
    if cfg.evaluation.knn_train_dataset and cfg.evaluation.knn_val_dataset:
        calls.insert(0, accuracy_evaluation(cfg))

    def evaluate(training: Training, iteration: int) -> None:
        for call in calls:
            call(training, iteration)

    return folder, train(
        cfg,
        folder,
        max_steps=max_steps,
        resume=resume,
        refuse_excess=refuse_excess,
        evaluate=evaluate,
        announce=announce,
    )


def _outside_images(folder: Path, cfg: Config) -> Path:
    """`folder`, unless it lies among the images: the pictures of the run would become images of the next start."""
    dataset = parse_dataset_str(cfg.train.dataset_path)
    root = str(dataset.arguments.get("root", "")) if dataset.kind.name == "folder" else ""
    if root and folder.resolve().is_relative_to(Path(root).expanduser().resolve()):
        raise ConfigError(
            f"the output folder {folder} lies in the folder of the images ({root}), where the run's pictures would be "
            "taken for images; choose an --output-dir outside of it"
        )
    return folder


def outcome_line(outcome: Outcome, folder: Path) -> str:
    """Sentence on the end of a training in `folder`."""
    notes = [f"{outcome.step:,} of {outcome.total:,} steps done"]
    if outcome.stopped_by:
        again = f"the same command with --output-dir {shlex.quote(str(folder))} goes on"
        notes.append(f"stopped by {outcome.stopped_by}, a checkpoint is saved: {again}")
    if outcome.unreadable:
        notes.append(f"{outcome.unreadable} images could not be read, see unreadable_images.json")
    if outcome.skipped:
        notes.append(f"{outcome.skipped} steps skipped, see skipped_steps.json")
    return "; ".join(notes)


def check_training(cfg: Config, *, output_dir: str | os.PathLike[str] | None = None, resume: bool = True) -> str:
    """Builds everything that a training would, writes nothing, and returns its summary and configuration."""
    folder = _outside_images(output_folder(output_dir, task="train"), cfg)
    run = RunFolder(folder)
    with run.exclusive():
        training = build_training(cfg, run, resume=resume)
    if cfg.evaluation.knn_train_dataset:
        accuracy_evaluation(cfg)
    return f"{summary(training)}\n\n{to_yaml(cfg)}"
