"""A text file that lists images: for subsets, for data spread over folders, for labels kept apart from the images.

`.txt`: one `path` or `path label` a line (a tab or spaces between; a path may contain spaces). `.csv`: with a header
that has a `path` and optionally a `label` column, or without a header, `path` or `path,label`. Paths are relative to
the list. Labels are class numbers from 0, kept as they are, or names, numbered in sorted order.
"""

import csv
import io
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from dinov2.data.datasets.base import FileDataset, digest
from dinov2.data.datasets.scanning import PathTable
from dinov2.data.decoding import IMAGE_EXTENSIONS, Exif
from dinov2.errors import DataError

__all__ = ["ListFile", "read_text"]

_LARGEST_LABEL = 1_000_000  # a larger "class number" is an identifier in the wrong column


class ListFile(FileDataset):
    """The images that `file` lists, in its order; EXIF orientation is applied.

    A listed file that is missing is reported when it is read, like any unreadable image; only when none of a sample of
    them exists is the list refused. Raises DataError when the list is missing, empty or inconsistent.
    """

    exif: ClassVar[Exif] = "apply"

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        self.file = os.path.abspath(file)
        self.root = os.path.dirname(self.file)
        rows = _read_rows(self.file)
        if not rows:
            raise DataError(f"the list {self.file} names no image; write one path a line")
        self._paths = PathTable(path for path, _ in rows)
        self.class_names, self._targets = _labels(self.file, [label for _, label in rows])
        sample = np.linspace(0, len(rows) - 1, num=min(16, len(rows)), dtype=int).tolist()
        if not any(os.path.isfile(self.path_of(index)) for index in sample):
            raise DataError(
                f"the list {self.file} names files that do not exist, such as {self.path_of(0)}; "
                f"write absolute paths, or paths relative to the folder of the list"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def fingerprint(self) -> str:
        sizes = np.array([_size(self.path_of(index)) for index in range(len(self))], dtype=np.int64)
        return digest("list", *self._paths.arrays, sizes, np.array([]) if self._targets is None else self._targets)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _read_rows(file: str) -> list[tuple[str, str | None]]:
    text = read_text(file)
    if not file.lower().endswith(".csv"):
        lines = [line.strip() for line in io.StringIO(text, newline=None)]
        return [_text_row(line) for line in lines if line]
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"the list {file} is no table of paths ({error}); write one path,label a line") from error
    return _csv_rows(file, rows)


def read_text(file: str) -> str:
    """The text of a list; names that are not UTF-8 keep their bytes. Raises DataError when it is no text."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            text = stream.read()
    except OSError as error:
        raise DataError(f"the list {file} cannot be read ({error.strerror or error})") from error
    if "\0" in text:
        raise DataError(f"{file} is no text; give a list with the path of one image a line")
    return text


def _text_row(line: str) -> tuple[str, str | None]:
    if "\t" in line:
        path, _, label = line.partition("\t")
        return path.strip(), label.strip() or None
    if os.path.splitext(line)[1].lower() in IMAGE_EXTENSIONS:  # "my photo.jpg": spaces belong to the path
        return line, None
    fields = line.rsplit(maxsplit=1)
    return fields[0], fields[1] if len(fields) == 2 else None


def _csv_rows(file: str, rows: list[list[str]]) -> list[tuple[str, str | None]]:
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    header = [cell.lower() for cell in rows[0]] if rows else []
    path_column, label_column = 0, 1
    if "path" in header:
        path_column = header.index("path")
        label_column = header.index("label") if "label" in header else len(header)
        rows = rows[1:]
    elif len(header) > 2:
        raise DataError(
            f"the list {file} has {len(header)} columns and no header with a column called path "
            f"(first line: {','.join(rows[0])}); add the header line path,label"
        )
    found: list[tuple[str, str | None]] = []
    for row in rows:
        if path_column >= len(row):
            raise DataError(f"the line {','.join(row)!r} of {file} has no path")
        found.append((row[path_column], (row[label_column] or None) if label_column < len(row) else None))
    return found


def _labels(file: str, labels: list[str | None]) -> tuple[list[str] | None, np.ndarray | None]:
    given = [label for label in labels if label is not None]
    if not given:
        return None, None
    if len(given) != len(labels):
        raise DataError(
            f"{len(labels) - len(given)} of the {len(labels)} images in {file} have no label "
            f"(the first is number {labels.index(None) + 1}); give a label to all of them or to none"
        )
    if all(label.isdecimal() for label in given):
        targets = np.array([int(label) for label in given], dtype=np.int64)
        if targets.max() > _LARGEST_LABEL:
            raise DataError(f"the label {targets.max()} in {file} is no class number; number the classes from 0")
        return [str(number) for number in range(int(targets.max()) + 1)], targets
    names = sorted(set(given))
    number = {name: index for index, name in enumerate(names)}
    return names, np.array([number[label] for label in given], dtype=np.int64)
