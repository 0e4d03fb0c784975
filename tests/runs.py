"""A run that several tests look at, and the parts of a command line that keep one small."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dinov2.train.train import train
from tests.train.tiny_run import TINY, tiny_config

__all__ = [
    "NEEDS_PYARROW",
    "PRESET",
    "SMALL",
    "TABLE_FORMATS",
    "Ended",
    "contents",
    "only_sentence",
    "pictures",
    "quiet_logger",
    "tiny_run",
]

SMALL = tuple(word for word in TINY if not word.startswith("train.dataset_path"))
"""Overrides for a training of twelve steps, images not named."""

PRESET = ("--preset", "toy", *SMALL)


NEEDS_PYARROW = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
TABLE_FORMATS = ("npz", "npy", pytest.param("parquet", marks=NEEDS_PYARROW))
"""Formats of tables of features, for `pytest.mark.parametrize`."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def tiny_run(folder: Path) -> Path:
    """A finished run of twelve steps with teachers after 5, 10 and 12."""
    with quiet_logger():
        train(tiny_config("evaluation.eval_period_iterations=5"), folder, announce=lambda text: None)
    return folder


@contextmanager
def quiet_logger() -> Iterator[None]:
    """The package's logger as it is in a fresh process; what was set up inside is closed and taken away again."""
    logger = logging.getLogger("dinov2")
    before = (logger.handlers, logger.level, logger.propagate)
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    try:
        yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


def pictures(folder: Path, *, n: int = 12, size: int = 24, classes: int = 0) -> Path:
    """`n` noisy PNG files, in class folders when `classes` is not 0."""
    for i in range(n):
        file = folder / (f"class{i % classes}" if classes else "") / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: bytes of files, None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def only_sentence(ended: Ended) -> str:
    """The one sentence with which a command refused; lines of the log, which carry a time, may stand before it."""
    lines = [line for line in ended.err.splitlines() if not (line[:2].isdigit() and line[2:3] == ":")]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("dinov2: ")
    return lines[0].removeprefix("dinov2: ")
