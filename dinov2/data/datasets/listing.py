"""A text file that lists images: for subsets, for data spread over folders, for labels kept apart from the images.

A table separated by commas, semicolons or tabs, one image a row, with its label in another column or without; or, in
`.txt` files, `path` or `path label` with spaces between. A header is recognised by what stands in the columns below it:
the one with image files is `path`. Paths are relative to the list. Labels are class numbers from 0, kept as they are,
or names, numbered in sorted order. What could be read in two ways is refused.
"""

import csv
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Unpack

import numpy as np

from dinov2.data.datasets.base import ImageDataset, Transforms, digest
from dinov2.data.datasets.files import NamedFiles
from dinov2.data.datasets.scanning import PathTable, ending, warn_of_others
from dinov2.data.decoding import IMAGE_EXTENSIONS, Exif
from dinov2.errors import DataError
from dinov2.whole_files import unescape_name

__all__ = ["ListFile", "rows_by_name"]

_LARGEST_FILE = 1 << 30  # bytes; ten million images take less
_LARGEST_LABEL = 1_000_000  # a larger "class number" is an identifier in the wrong column
_PATH_NAMES = {"path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img"}
_LABEL_NAMES = {"label", "labels", "class", "class_id", "class_name", "target", "category"}
_MISSING = "nan"  # how pandas writes a cell that it has no value for
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf", re.IGNORECASE | re.ASCII)
_PATH_THEN_LABEL = re.compile(rf"(.*({'|'.join(map(re.escape, IMAGE_EXTENSIONS))}))\s+(\S.*)", re.IGNORECASE)
_ENCODINGS = {b"\xff\xfe\0\0": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}

_Row = tuple[str, str | None]  # path and label


class ListFile(NamedFiles):
    """The images that `file` lists, in its order; EXIF orientation is applied.

    A listed file that is missing is reported when it is read, like any unreadable image; a warning counts those that
    are missing or have endings of other files, and when none of a sample exists, the list is refused. Raises DataError
    when the list is missing, empty, ambiguous or inconsistent.
    """

    kind = "list"
    exif: ClassVar[Exif] = "apply"

    def __init__(self, file: str | os.PathLike[str], **transforms: Unpack[Transforms]) -> None:
        super().__init__(**transforms)
        self.file = os.path.abspath(file)
        self.root = os.path.dirname(self.file)
        rows = _read_rows(self.file)
        if not rows:
            raise DataError(f"the list {self.file} names no image; write one path a line")
        _refuse_two_labels(self.file, rows)
        paths = _spelt_as_files(self.file, [path for path, _ in rows])
        self._paths = PathTable(paths)
        self._sizes = np.array([_size(os.path.join(self.root, path)) for path in paths], dtype=np.int64)
        self.class_names, self._targets = _labels(self.file, [label for _, label in rows])
        warn_of_others(self.file, _count_others(paths, self._sizes), fate="unlikely to be read")

    def fingerprint(self) -> str:
        targets = np.array([]) if self._targets is None else self._targets
        return digest(self.kind, *self._paths.arrays, self._sizes, targets)


def rows_by_name(dataset: ImageDataset, file: str | os.PathLike[str]) -> np.ndarray:  # -> int64 [R]
    """Numbers of the images that a text file names, one a line, in the order of the data set.

    Few-shot lists, such as the 1 % and 10 % of ImageNet, are written so. A name without a folder (as in SimCLR's
    `1percent.txt`) stands for the file of that name; with folders, for the path that ends so. Raises DataError when a
    name fits no image or several, or stands there twice.
    """
    lines = _read_text(os.fspath(file)).splitlines()
    names = [line.strip().replace(os.sep, "/").removeprefix("./") for line in lines if line.strip()]
    if not names:
        raise DataError(f"the list {file} names no image; write one file name a line")
    row_by_name: dict[str, int] = {}
    depths = {name.count("/") + 1 for name in names}
    known = set(names)
    for index in range(len(dataset)):
        parts = dataset.path_of(index).replace(os.sep, "/").split("/")
        for name in ("/".join(parts[-depth:]) for depth in depths):
            if name in known and row_by_name.setdefault(name, index) != index:
                raise DataError(f"{name} in the list {file} is the name of several images; write more of its path")
    missing = [name for name in names if name not in row_by_name]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(names)} images that {file} names are not in the data set, "
            f"the first is {missing[0]}"
        )
    rows = np.unique([row_by_name[name] for name in names])
    if len(rows) != len(names):
        raise DataError(f"the list {file} names {len(names) - len(rows)} images twice; name each once")
    return rows


def _read_text(file: str) -> str:
    """The text of a list, in UTF-8 or with the byte order mark of UTF-16 or UTF-32, lines ended by a newline.

    Bytes that are no UTF-8 are kept, as Python keeps those of file names. Raises DataError for what is no regular file,
    without opening it, and for what is no text or larger than a list can be.
    """
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"the list {file} is no regular file; give a text file with the path of one image a line")
        with open(file, "rb") as stream:
            start = stream.read(1 << 16)
            encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
            if encoding.startswith("utf-8") and b"\0" in start:
                raise DataError(f"{file} is no text; give a list with the path of one image a line")
            if status.st_size > _LARGEST_FILE:
                raise DataError(f"the list {file} has {status.st_size:,} bytes, more than 1 GiB; split it")
            text = (start + stream.read()).decode(encoding, "surrogateescape")
    except OSError as error:
        raise DataError(f"the list {file} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the list {file} is no text in {encoding.upper()} ({error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise DataError(f"{file} is no text; give a list with the path of one image a line")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _size(path: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _count_others(paths: Sequence[str], sizes: np.ndarray) -> Counter[str]:
    """Listed files that are missing, or end as other files do, by ending; a name without an ending tells nothing."""
    other: Counter[str] = Counter()
    for path, size in zip(paths, sizes.tolist(), strict=True):
        extension = os.path.splitext(path)[1].lower()
        if size < 0:
            other[f"{ending(path)} that do not exist"] += 1
        elif extension and extension not in IMAGE_EXTENSIONS:
            other[ending(path)] += 1
    return other


def _read_rows(file: str) -> list[_Row]:
    folder = os.path.dirname(file)
    lines = [line for line in _read_text(file).split("\n") if line.strip() and not _is_comment(line, folder)]
    if not lines:
        return []
    try:
        heads = {mark: _cells(lines[:2], mark) for mark in "\t;," if mark in lines[0]}
        separators = [mark for mark, rows in heads.items() if _is_table(rows, folder)]
        if file.lower().endswith(".txt") and not (separators and _has_columns(lines[0].strip(), heads, folder)):
            return [_text_row(line.strip()) for line in lines]
        if len(separators) > 1:
            raise DataError(
                f"the columns of {file} could be separated by {' or by '.join(map(repr, separators))} (first line: "
                f"{lines[0]}); quote the paths that hold one of them"
            )
        rows = _cells(lines, separators[0] if separators else ",")
    except csv.Error as error:
        raise DataError(f"the list {file} is no table of paths ({error}); write one path,label a line") from error
    return _table_rows(file, rows)


def _is_comment(line: str, folder: str) -> bool:
    """Whether a line begins with # and names no file, or is Excel's `sep=;`."""
    if not line.startswith("#"):
        return re.fullmatch(r"sep=.", line, re.IGNORECASE) is not None
    paths = (line.strip(), _text_row(line.strip())[0], re.split(r"[\t;,]", line)[0].strip())
    return not any(_is_file(path, folder) for path in paths)


def _text_row(line: str) -> _Row:
    if quoted := re.fullmatch(r'"([^"]+)"\s*(.*)', line):
        return quoted[1], quoted[2] or None
    if os.path.splitext(line)[1].lower() in IMAGE_EXTENSIONS:  # "my photo.jpg": spaces belong to the path
        return line, None
    if match := _PATH_THEN_LABEL.fullmatch(line):  # so that a label may contain spaces too
        return match[1], match[3]
    fields = line.rsplit(maxsplit=1)
    return fields[0], fields[1] if len(fields) == 2 else None


def _cells(lines: Sequence[str], separator: str) -> list[list[str]]:
    """The rows of a table without empty cells at their ends."""
    table = []
    for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, skipinitialspace=True):
        cells = [cell.strip() for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            table.append(cells)
    return table


def _is_table(rows: Sequence[Sequence[str]], folder: str) -> bool:
    return "path" in map(str.lower, rows[0]) or any(_is_image(cell, folder) for row in rows for cell in row)


def _has_columns(line: str, heads: Mapping[str, Sequence[Sequence[str]]], folder: str) -> bool:
    """Whether the commas of a line are not those of a path such as "my, photo.jpg"."""
    if os.path.splitext(line)[1].lower() not in IMAGE_EXTENSIONS:
        return True
    cells = [cell for rows in heads.values() for cell in rows[0]]
    return any(_is_file(cell, folder) for cell in cells) and not _is_file(line, folder)


def _is_image(cell: str, folder: str) -> bool:
    return os.path.splitext(cell)[1].lower() in IMAGE_EXTENSIONS or _is_file(cell, folder)


def _is_file(path: str, folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, path))


def _table_rows(file: str, rows: list[list[str]]) -> list[_Row]:
    first, folder = [cell.lower() for cell in rows[0]], os.path.dirname(file)
    sample = rows[1:101] or rows
    shares = [
        sum(column < len(row) and _is_image(row[column], folder) for row in sample) / len(sample)
        for column in range(len(first))
    ]
    images = [column for column, share in enumerate(shares) if share > 0.5]
    has_header = "path" in first or (
        not any(_is_image(cell, folder) or _NUMBER.fullmatch(cell) for cell in rows[0])
        and bool(images or set(first) & (_PATH_NAMES | _LABEL_NAMES))
    )
    path_column = _path_column(file, first, images, has_header)
    label_column = _label_column(file, first, path_column, has_header)
    paths: list[_Row] = []
    for row in rows[1:] if has_header else rows:
        if len(row) > len(first):
            raise DataError(
                f"the line {','.join(row)!r} of {file} has {len(row)} columns, the first has {len(first)}; quote paths "
                "that hold the mark between columns"
            )
        if path_column >= len(row) or not row[path_column]:
            raise DataError(f"the line {','.join(row)!r} of {file} has no path")
        label = row[label_column] if label_column is not None and label_column < len(row) else ""
        paths.append((row[path_column], label or None))
    return paths


def _path_column(file: str, first: list[str], images: list[int], has_header: bool) -> int:
    if "path" in first:
        return first.index("path")
    named = [column for column, name in enumerate(first) if has_header and name in _PATH_NAMES]
    candidates = images if len(images) == 1 or not named else named
    if len(candidates) > 1:
        raise DataError(
            f"the list {file} has image files in {len(candidates)} columns (first line: {','.join(first)}); give it a "
            "header, and call the right one path"
        )
    return candidates[0] if candidates else 0


def _label_column(file: str, first: list[str], path_column: int, has_header: bool) -> int | None:
    others = [column for column in range(len(first)) if column != path_column]
    named = [column for column in others if first[column] in _LABEL_NAMES]
    if has_header and "label" in first:
        return first.index("label")
    if has_header and (len(named) == 1 or "path" in first):
        return named[0] if len(named) == 1 else None
    if len(others) <= 1:
        return others[0] if others else None
    raise DataError(
        f"the list {file} has {len(first)} columns and no header with a column called path and one called label "
        f"(first line: {','.join(first)}); add the header line, path,label for two columns"
    )


def _refuse_two_labels(file: str, rows: Sequence[_Row]) -> None:
    known: dict[str, str] = {}
    for path, label in rows:
        if label is not None and known.setdefault(path, label) != label:
            raise DataError(
                f"the list {file} names {path} with the labels {known[path]} and {label}; give each image one label"
            )


def _spelt_as_files(file: str, paths: Sequence[str]) -> Sequence[str]:
    """The paths as the files are called here. Raises DataError when none of a sample of them exists.

    A list may come from Windows, or from a program that wrote names in its own encoding or escaped.
    """
    folder = os.path.dirname(file)

    def exists(path: str) -> bool:
        return _is_file(path, folder)

    sample = [paths[row] for row in np.linspace(0, len(paths) - 1, num=min(16, len(paths)), dtype=int).tolist()]
    spellings: tuple[Callable[[str], str], ...] = (str, _with_slashes, _from_windows, unescape_name)
    counts = [sum(exists(spelling(path)) for path in sample) for spelling in spellings]
    if not any(counts):
        raise DataError(
            f"the list {file} names files that do not exist, such as {os.path.join(folder, paths[0])}; "
            f"write absolute paths, or paths relative to the folder of the list"
        )
    spelling = spellings[counts.index(max(counts))]
    spelt = [spelling(path) for path in paths]
    # A name as `dinov2 embed` writes it may be one among thousands.
    return [unescape_name(path) if "\\u" in path and exists(unescape_name(path)) else path for path in spelt]


def _with_slashes(path: str) -> str:
    return path.replace("\\", "/")


def _from_windows(path: str) -> str:
    """A path as Western Windows writes it: backslashes, and bytes that are no UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        path = path.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    return _with_slashes(path)


def _labels(file: str, labels: list[str | None]) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names by number, and labels int64 `[S]`; both None when no image has a label."""
    labels = [None if label is not None and label.lower() == _MISSING else label for label in labels]
    given = [label for label in labels if label is not None]
    if not given:
        return None, None
    if len(given) != len(labels):
        raise DataError(
            f"{len(labels) - len(given)} of the {len(labels)} images in {file} have no label "
            f"(the first is number {labels.index(None) + 1}); give a label to all of them or to none"
        )
    names = sorted(set(given))
    numbers = [name for name in names if _NUMBER.fullmatch(name)]
    if not numbers:
        order = {name: index for index, name in enumerate(names)}
        return names, np.array([order[label] for label in given], dtype=np.int64)
    if len(numbers) < len(names):
        other = next(name for name in names if name not in set(numbers))
        raise DataError(
            f"the labels in {file} are numbers ({numbers[0]}) and names ({other}); write class numbers for all images, "
            "or names"
        )
    classes = {name: float(name) for name in names}  # `3.0`, as pandas writes a column that had a gap
    for name, value in classes.items():
        if not (0 <= value <= _LARGEST_LABEL and value == int(value)):
            raise DataError(
                f"the label {name} in {file} is no class number; number the classes from 0, or write no labels at all"
            )
    targets = np.array([int(classes[label]) for label in given], dtype=np.int64)
    return [str(number) for number in range(int(targets.max()) + 1)], targets
