"""ImageNet-A, R, Sketch and V2: one folder a class, named by the wnid or, in V2, by the number of the class.

    imagenet-a/<wnid>/*.jpg                                200 classes (Hendrycks et al. 2021, adversarially filtered)
    imagenet-r/<wnid>/*.jpg                                200 others (Hendrycks et al. 2021, renditions)
    sketch/<wnid>/*.JPEG                                   1,000 (Wang et al. 2019)
    imagenetv2-<variant>-format-val/<0 ... 999>/*.jpeg     1,000 (Recht et al. 2019)

`root` is that folder or the one that holds it. The folders "0", "1", "10", ... of V2 sort as texts, so a reader that
counts folders, as for any other tree, scrambles its labels; here the name is the number. Subsets are welcome: an
unexpected number of images is logged, not refused.
"""

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.base import FileDataset, digest
from dinov2.data.datasets.scanning import PathTable, scan_folder
from dinov2.errors import DataError

__all__ = ["ImageNetA", "ImageNetR", "ImageNetSketch", "ImageNetTestSet", "ImageNetV2", "find_folder", "official_class"]

logger = logging.getLogger("dinov2")


class ImageNetTestSet(FileDataset):
    """Images of classes of ImageNet-1k in class folders below `root`; EXIF orientation is ignored, as in ImageNet.

    The labels 0 .. C - 1 of a set of 200 classes are the ranks of the wnids, as the release counts class folders;
    those of a set of all classes are the official numbers, whichever folders are there. `class_mapping` (int64 `[C]`)
    holds the official number of each, `class_ids` their wnids and `class_names` their names in words.

    Raises DataError when the layout is not that of the archive.
    """

    title: ClassVar[str]
    """Name in dataset strings and messages."""
    n_images: ClassVar[int]
    """Images of the complete set."""
    n_classes: ClassVar[int]
    layout: ClassVar[str]
    """What is expected below `root`."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        self.root = find_folder(root, self.archive_folders())
        scan = scan_folder(self.root)
        if not len(scan.paths):
            raise DataError(f"no image was found in {self.root}; {self.title} expects {self.layout}")
        self._paths, self._sizes = scan.paths, scan.sizes
        official = self._official_classes(scan.paths)
        if self.n_classes == len(imagenet_classes.IMAGENET_CLASSES):
            self.class_mapping = np.arange(self.n_classes, dtype=np.int64)
        else:
            self.class_mapping = np.unique(official)
        self._targets = np.searchsorted(self.class_mapping, official)
        if len(self.class_mapping) > self.n_classes:
            raise DataError(
                f"{self.root} holds {len(self.class_mapping)} classes and {self.title} has {self.n_classes}; "
                f"is it another data set?"
            )
        self.class_ids = [imagenet_classes.IMAGENET_CLASSES[number].wnid for number in self.class_mapping.tolist()]
        self.class_names = [imagenet_classes.IMAGENET_CLASSES[number].name for number in self.class_mapping.tolist()]
        found_classes = len(np.unique(official))
        if len(self) != self.n_images or found_classes != self.n_classes:
            logger.warning(
                "%s in %s holds %d of %d images and %d of %d classes",
                *(self.title, self.root, len(self), self.n_images, found_classes, self.n_classes),
            )

    @abstractmethod
    def archive_folders(self) -> Sequence[str]:
        """Names that the folder of the unpacked archive may have inside `root`."""

    @abstractmethod
    def official_class_of(self, folder: str) -> int | None:
        """Number in ImageNet-1k of the class that a folder holds; None when the name is none of a class."""

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self.root, *self._paths[index].split("/"))

    def get_target(self, index: int) -> int:
        return int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        return self._targets

    def fingerprint(self) -> str:
        return digest(self.title, *self._paths.arrays, self._sizes)

    def _official_classes(self, paths: PathTable) -> np.ndarray:  # int64 [S]
        numbers: dict[str, int] = {}
        official = np.empty(len(paths), dtype=np.int64)
        for index, path in enumerate(paths):
            folder, slash, _ = path.partition("/")
            if not slash:
                raise DataError(f"{path} in {self.root} lies in no class folder; {self.title} expects {self.layout}")
            if folder not in numbers:
                number = self.official_class_of(folder)
                if number is None:
                    raise DataError(
                        f"the folder {folder} in {self.root} names no class of ImageNet-1k; "
                        f"{self.title} expects {self.layout}"
                    )
                numbers[folder] = number
            official[index] = numbers[folder]
        return official


class ImageNetA(ImageNetTestSet):
    """7,500 natural photographs that a ResNet-50 gets wrong, of 200 classes."""

    title = "ImageNetA"
    n_images = 7_500
    n_classes = 200
    layout = "imagenet-a/<wnid>/*.jpg, as imagenet-a.tar unpacks"

    def archive_folders(self) -> Sequence[str]:
        return ("imagenet-a",)

    def official_class_of(self, folder: str) -> int | None:
        return official_class(folder)


class ImageNetR(ImageNetTestSet):
    """30,000 paintings, toys, tattoos and other renditions, of 200 classes that are not those of ImageNet-A."""

    title = "ImageNetR"
    n_images = 30_000
    n_classes = 200
    layout = "imagenet-r/<wnid>/*.jpg, as imagenet-r.tar unpacks"

    def archive_folders(self) -> Sequence[str]:
        return ("imagenet-r",)

    def official_class_of(self, folder: str) -> int | None:
        return official_class(folder)


class ImageNetSketch(ImageNetTestSet):
    """50,889 black-and-white drawings of all 1,000 classes."""

    title = "ImageNetSketch"
    n_images = 50_889
    n_classes = 1_000
    layout = "sketch/<wnid>/*.JPEG, as ImageNet-Sketch.zip unpacks"

    def archive_folders(self) -> Sequence[str]:
        return ("sketch", "ImageNet-Sketch", "imagenet-sketch")

    def official_class_of(self, folder: str) -> int | None:
        return official_class(folder)


class ImageNetV2(ImageNetTestSet):
    """10,000 new photographs of all 1,000 classes, collected as ImageNet's validation set was.

    The variants differ in how often human annotators chose the label: `matched-frequency` (as often as in ImageNet, the
    one that papers report), `threshold-0.7` and `top-images`.
    """

    title = "ImageNetV2"
    n_images = 10_000
    n_classes = 1_000
    layout = "imagenetv2-<variant>-format-val/<0 ... 999>/*.jpeg, as the archives unpack"
    variants: ClassVar[dict[str, tuple[str, ...]]] = {
        "matched-frequency": ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
        "threshold-0.7": ("imagenetv2-threshold0.7-format-val", "imagenetv2-threshold0.7"),
        "top-images": ("imagenetv2-top-images-format-val", "imagenetv2-topimages-format-val", "imagenetv2-topimages"),
    }
    """Variants and the folders that their archives unpack to."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        variant: Literal["matched-frequency", "threshold-0.7", "top-images"] = "matched-frequency",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if variant not in self.variants:
            raise DataError(f"ImageNetV2 has no variant {variant!r}; write one of {', '.join(self.variants)}")
        self.variant = variant
        others = [name for other, names in self.variants.items() if other != variant for name in names]
        if os.path.basename(os.path.abspath(root)) in others:
            raise DataError(f"{os.path.abspath(root)} is not the variant {variant} of ImageNetV2; name its own variant")
        super().__init__(root, transform=transform, target_transform=target_transform)

    def archive_folders(self) -> Sequence[str]:
        return self.variants[self.variant]

    def official_class_of(self, folder: str) -> int | None:
        return int(folder) if folder.isascii() and folder.isdecimal() and int(folder) < self.n_classes else None


def find_folder(root: str | os.PathLike[str], names: Sequence[str]) -> str:
    """The first folder of one of the given names in `root`, else `root` itself; absolute."""
    root = os.path.abspath(root)
    inside = [os.path.join(root, name) for name in names]
    return next((folder for folder in inside if os.path.isdir(folder)), root)


def official_class(wnid: str) -> int | None:
    """Number of a wnid among the 1,000 classes; None for any other text."""
    return _numbers().get(wnid)


@cache
def _numbers() -> dict[str, int]:
    return {row.wnid: number for number, row in enumerate(imagenet_classes.IMAGENET_CLASSES)}
