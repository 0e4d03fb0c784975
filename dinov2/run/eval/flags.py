"""Inputs of an evaluation from the release's flags, and the last lines of a command."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from dinov2.apps.evaluation.context import EvalConfig
from dinov2.configs import load_config
from dinov2.distributed import is_main_process
from dinov2.engine.parallel import choose_device
from dinov2.errors import ConfigError
from dinov2.eval.result import Result
from dinov2.logging import setup_logging

__all__ = ["config_from_flags", "report_rows"]

_RELEASE_WORKERS = 5
_PRECISION_KEY = "compute_precision.teacher.backbone.mixed_precision.param_dtype"


def config_from_flags(
    arguments: argparse.Namespace,
    *,
    batch_size: int = 256,
    num_workers: int = _RELEASE_WORKERS,
    resize_to_crop: bool = False,
) -> EvalConfig:
    """The flags that all of the release's evaluations share. Raises `ConfigError` when the weights are missing."""
    if not arguments.pretrained_weights:
        raise ConfigError("--pretrained-weights is missing; give a weight file, its address or a run's folder")
    setup_logging()
    return EvalConfig(
        model=arguments.pretrained_weights,
        train_dataset=arguments.train_dataset,
        val_dataset=arguments.val_dataset,
        output_dir=arguments.output_dir or None,
        config_file=arguments.config_file or None,
        overrides=arguments.opts,
        batch_size=batch_size,
        num_workers=min(num_workers, os.cpu_count() or 1),
        resize_to_crop=resize_to_crop,
        precision=_precision(arguments.config_file or None, arguments.opts),
        say=partial(print, flush=True),
    )


def _precision(config_file: str | None, overrides: Sequence[str]) -> str:
    """The precision of the teacher's backbone in the configuration, as in the release.

    Its default is fp16, which CPUs compute many times slower than float32: there it has to be among the overrides.
    """
    cfg = load_config(config_file, overrides)
    name: str = cfg.compute_precision.teacher.backbone.mixed_precision.param_dtype
    overridden = any(override.startswith(f"{_PRECISION_KEY}=") for override in overrides)
    if name != "fp16" or overridden or choose_device("auto").type != "cpu":
        return name
    if is_main_process():
        print(f"note: bf16 or fp32 in place of fp16, at which CPUs are slow; --opts {_PRECISION_KEY}=fp16 insists")
    return "auto"


def report_rows(rows: Sequence[Result], folder: Path) -> None:
    """A line for each figure, of several data sets below their names, then the notes and where all was written."""
    of_several = len({row.dataset for row in rows}) > 1
    for dataset, own in groupby(rows, key=lambda row: row.dataset):
        if of_several:
            print(f"{dataset}:", flush=True)
        for row in own:
            which = f"k={row.k} " if row.k is not None else ""
            print(f"{which}{row.metric}: {row.value:.2f} %", flush=True)
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        print(f"note: {note}", flush=True)
    print(f"results are in {folder}", flush=True)
