"""From the release's evaluation flags to the inputs of an evaluation, and what a command says at its end."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from dinov2.apps.evaluation.session import Inputs
from dinov2.errors import ConfigError
from dinov2.features.results import Result
from dinov2.logging import setup_logging

__all__ = ["inputs_of", "report_rows"]

_RELEASE_WORKERS = 5


def inputs_of(arguments: argparse.Namespace, **rest: Any) -> Inputs:
    """The flags that all of the release's evaluations share. Raises `ConfigError` when the weights are missing."""
    if not arguments.pretrained_weights:
        raise ConfigError("--pretrained-weights is missing; give a weight file, its address or a run's folder")
    setup_logging()
    shared: dict[str, Any] = {
        "model": arguments.pretrained_weights,
        "train_dataset": arguments.train_dataset,
        "val_dataset": arguments.val_dataset,
        "output_dir": arguments.output_dir or None,
        "config_file": arguments.config_file or None,
        "overrides": arguments.opts,
        "num_workers": min(_RELEASE_WORKERS, os.cpu_count() or 1),
        "say": partial(print, flush=True),
    }
    return Inputs(**{**shared, **rest})


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
