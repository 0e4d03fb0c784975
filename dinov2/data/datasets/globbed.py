"""Image files by name: one by one, in a folder, or by a pattern such as `photos/**/*.jpg`."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from dinov2.data.datasets.base import FileDataset, digest
from dinov2.data.datasets.scanning import PathTable, ending_of, in_words, scan_folder, warn_of_others
from dinov2.data.decoding import IMAGE_EXTENSIONS, Exif
from dinov2.errors import DataError

__all__ = ["ImageFiles", "globbed", "images_named"]


class ImageFiles(FileDataset):
    """The given files, in the order given, without labels; EXIF orientation is applied.

    Paths are relative to `root`, which is the current folder unless another one is named. Raises DataError when there
    is none, or when one of them does not exist.
    """

    exif: ClassVar[Exif] = "apply"

    def __init__(
        self,
        paths: Sequence[str],
        *,
        root: str | os.PathLike[str] = ".",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        if not paths:
            raise DataError("no image was named; give at least one file")
        self.root = os.path.abspath(root)
        self._paths = PathTable(paths)
        sizes = [_size(self.path_of(index)) for index in range(len(paths))]
        if None in sizes:
            raise DataError(f"there is no image file {paths[sizes.index(None)]}; check the path")
        self._sizes = np.array(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def get_target(self, index: int) -> int | None:
        return None

    def get_targets(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return digest("files", *self._paths.arrays, self._sizes)


def globbed(
    pattern: str,
    *,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[Any], Any] | None = None,
) -> ImageFiles:
    """The image files that match a pattern of the shell, `**` for any depth, in the order of their paths.

    What matches and has no extension of an image is passed over. Raises DataError when nothing is left.
    """
    return ImageFiles(_matching(os.path.expanduser(pattern)), transform=transform, target_transform=target_transform)


def images_named(source: str | os.PathLike[str]) -> list[str]:
    """Paths of the images that one name stands for: a file, a folder with all that lies below it, or a pattern.

    Those of a folder or pattern are in the order of their paths. An existing path wins over a pattern. Raises DataError
    when there is no image.
    """
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        scan = scan_folder(path)
        if not len(scan.paths):
            others = f" ({in_words(scan.other)})" if scan.other else ""
            raise DataError(
                f"the folder {path} holds no images{others}; give one with .jpg, .png or other image files in it"
            )
        warn_of_others(path, scan.other)
        return [os.path.join(path, relative) for relative in scan.paths]
    if os.path.exists(path):
        return [path]
    if "://" in path:
        raise DataError(f"{path} is an address, and images are not downloaded; give the path of a file")
    if not glob.has_magic(path):
        raise DataError(f"there is no image or folder {path}; check the path")
    return _matching(path)


def _matching(pattern: str) -> list[str]:
    found: list[str] = []
    other: Counter[str] = Counter()
    for path in glob.iglob(pattern, recursive=True):
        if not os.path.isdir(path):
            if os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS and os.path.isfile(path):
                found.append(path)
            else:
                other[ending_of(path)] += 1
    if not found:
        others = f", but {in_words(other)}" if other else ""
        raise DataError(
            f"no image matches {pattern}{others}; small and capital letters differ, ** stands for any depth, and a "
            "shell leaves the pattern alone in quotes"
        )
    warn_of_others(pattern, other)
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))  # by components, as the images of a folder


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size if os.path.isfile(path) else None
    except OSError:
        return None
