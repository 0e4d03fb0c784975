"""Image files by name: all of a folder with its classes, some one by one, or those of a pattern of the shell.

The first level of folders are the classes, when every image lies in one; a folder with images directly in it has no
labels. So `photos/` works as it is, and so does `train/<class>/.../x.jpg`.
"""

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Unpack

import numpy as np

from dinov2.data.datasets.base import FileDataset, Transforms, digest
from dinov2.data.datasets.scanning import PathTable, ending, find_images, name_endings, warn_of_others
from dinov2.data.decoding import IMAGE_EXTENSIONS, Exif
from dinov2.errors import DataError

__all__ = ["Folder", "ImageFiles", "NamedFiles", "find_image_files", "glob_images"]

logger = logging.getLogger("dinov2")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_FOLDER_ADVICE = "give a folder that holds .jpg, .png or other image files at any depth"


class NamedFiles(FileDataset):
    """Files `root/<path>` with their sizes and, perhaps, labels; `kind` begins the fingerprint."""

    kind: ClassVar[str]
    root: str
    _paths: PathTable
    _sizes: np.ndarray  # int64 [S]
    _targets: np.ndarray | None = None  # int64 [S]

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def fingerprint(self) -> str:
        return digest(self.kind, *self._paths.arrays, self._sizes)


class Folder(NamedFiles):
    """All images below `root`, in the order of their paths; EXIF orientation is applied.

    `skipped` counts the files passed over: `{"hidden": ..., "other": ...}`. Raises DataError when the folder is missing
    or holds no image.
    """

    kind = "folder"
    exif: ClassVar[Exif] = "apply"

    def __init__(self, root: str | os.PathLike[str], **transforms: Unpack[Transforms]) -> None:
        super().__init__(**transforms)
        self.root = os.path.abspath(root)
        scan = find_images(self.root, advice=_FOLDER_ADVICE)
        self.skipped = {"hidden": scan.hidden, "other": sum(scan.other.values())}
        self._paths, self._sizes = scan.paths, scan.sizes
        self.class_names, self._targets = _classes_by_folder(scan.paths)
        if self.class_names and {name.lower() for name in self.class_names} <= _SPLIT_NAMES:
            logger.warning(
                "the classes of %s are %s, which look like splits; for labels give one of these folders instead",
                self.root,
                ", ".join(self.class_names),
            )


class ImageFiles(NamedFiles):
    """The given files, in the order given, without labels; EXIF orientation is applied.

    Paths are relative to `root`, which is the current folder unless another one is named. Raises DataError when there
    is none, or when one of them does not exist.
    """

    kind = "files"
    exif: ClassVar[Exif] = "apply"

    def __init__(
        self, paths: Sequence[str], *, root: str | os.PathLike[str] = ".", **transforms: Unpack[Transforms]
    ) -> None:
        super().__init__(**transforms)
        if not paths:
            raise DataError("no image was named; give at least one file")
        self.root = os.path.abspath(root)
        self._paths = PathTable(paths)
        sizes = [_size(self.path_of(index)) for index in range(len(paths))]
        if None in sizes:
            raise DataError(f"there is no image file {paths[sizes.index(None)]}; check the path")
        self._sizes = np.array(sizes, dtype=np.int64)


def glob_images(pattern: str, **transforms: Unpack[Transforms]) -> ImageFiles:
    """The image files that match a pattern of the shell, `**` for any depth, in the order of their paths.

    What matches and has no extension of an image is passed over. Raises DataError when nothing is left.
    """
    return ImageFiles(_matching(os.path.expanduser(pattern)), **transforms)


def find_image_files(source: str | os.PathLike[str]) -> list[str]:
    """Paths of the images that one name stands for: a file, a folder with all that lies below it, or a pattern.

    Those of a folder or pattern are in the order of their paths. An existing path wins over a pattern. Raises DataError
    when there is no image.
    """
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        return [os.path.join(path, relative) for relative in find_images(path, advice=_FOLDER_ADVICE).paths]
    if os.path.exists(path):
        return [path]
    if "://" in path:
        raise DataError(f"{path} is an address, and images are not downloaded; give the path of a file")
    if not glob.has_magic(path):
        raise DataError(f"there is no image or folder {path}; check the path")
    return _matching(path)


def _matching(pattern: str) -> list[str]:
    paths: list[str] = []
    other: Counter[str] = Counter()
    for path in glob.iglob(pattern, recursive=True):
        if not os.path.isdir(path):
            if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS and os.path.isfile(path):
                paths.append(path)
            else:
                other[ending(path)] += 1
    if not paths:
        others = f", but {name_endings(other)}" if other else ""
        raise DataError(
            f"no image matches {pattern}{others}; small and capital letters differ, ** stands for any depth, and a "
            "shell leaves the pattern alone in quotes"
        )
    warn_of_others(pattern, other)
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))  # by components, as the images of a folder


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size if os.path.isfile(path) else None
    except OSError:
        return None


def _classes_by_folder(paths: PathTable) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names in order and labels int64 `[S]`; `(None, None)` when an image lies outside all class folders."""
    names: dict[str, int] = {}
    targets = np.empty(len(paths), dtype=np.int64)
    for index, path in enumerate(paths):
        first, slash, _ = path.partition("/")
        if not slash:
            return None, None
        targets[index] = names.setdefault(first, len(names))  # paths are sorted, so the names come in order
    return list(names), targets
