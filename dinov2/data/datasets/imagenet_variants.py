"""The test sets made for classifiers of ImageNet-1k: A, R, Sketch, V2, C, and the reassessed labels of ReaL.

    imagenet-a/<wnid>/*.jpg                                200 classes (Hendrycks et al. 2021, adversarially filtered)
    imagenet-r/<wnid>/*.jpg                                200 others (Hendrycks et al. 2021, renditions)
    sketch/<wnid>/*.JPEG                                   1,000 (Wang et al. 2019)
    imagenetv2-<variant>-format-val/<0 ... 999>/*.jpeg     1,000 (Recht et al. 2019)
    <corruption>/<severity>/<wnid>/ILSVRC2012_val_*.JPEG   1,000 (ImageNet-C, Hendrycks and Dietterich 2019)

Each is read as its public archive unpacks; `root` is that folder or the one that holds it. The folders "0", "1", "10",
... of V2 sort as texts, so a reader that counts folders, as for any other tree, scrambles its labels; here the name is
the number. The images of C are 224 x 224 already: evaluate them without resizing, as `dinov2.data.eval_transform` does
with images of the size of the crop. Subsets are welcome: an unexpected number of images is logged, not refused.

Each set knows which class of ImageNet-1k each of its own classes is (`class_mapping`, int64 `[C]`), so that the answers
of a classifier of all 1,000 are chosen among them.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, Unpack

import numpy as np

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.base import FileDataset, Transforms, digest, read_bytes
from dinov2.data.datasets.files import NamedFiles
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.imagenet_classes import number_of_wnid
from dinov2.data.datasets.scanning import PathTable, find_images, scan_folder, warn_of_others
from dinov2.errors import DataError

__all__ = [
    "CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "SEVERITIES",
    "ImageNetA",
    "ImageNetC",
    "ImageNetR",
    "ImageNetReaL",
    "ImageNetSketch",
    "ImageNetV2",
]

logger = logging.getLogger("dinov2")

_N_CLASSES = 1000

CORRUPTIONS = {
    **dict.fromkeys(("gaussian_noise", "shot_noise", "impulse_noise"), "noise"),
    **dict.fromkeys(("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"), "blur"),
    **dict.fromkeys(("snow", "frost", "fog", "brightness"), "weather"),
    **dict.fromkeys(("contrast", "elastic_transform", "pixelate", "jpeg_compression"), "digital"),
}
"""The corruptions of ImageNet-C, in the order of its paper, and the archive that holds each."""

EXTRA_CORRUPTIONS = dict.fromkeys(("speckle_noise", "gaussian_blur", "spatter", "saturate"), "extra")
"""Four more, meant for choosing settings; no part of the mean corruption error."""

SEVERITIES = (1, 2, 3, 4, 5)

_C_IMAGES = 50_000  # of a complete part
_C_LAYOUT = "<corruption>/<severity>/<wnid>/*.JPEG, as the archives of ImageNet-C unpack"
_REAL_FILE = "real.json"


class _OfficialClasses:
    """Classes that are some or all of ImageNet-1k's."""

    class_mapping: np.ndarray
    class_ids: list[str] | None
    class_names: list[str] | None

    def _set_classes(self, numbers: Iterable[int]) -> None:
        self.class_mapping = np.array(list(numbers), dtype=np.int64)
        rows = [imagenet_classes.IMAGENET_CLASSES[number] for number in self.class_mapping.tolist()]
        self.class_ids = [row.wnid for row in rows]
        self.class_names = [row.name for row in rows]


class _TestSet(_OfficialClasses, NamedFiles):
    """Images of classes of ImageNet-1k in class folders below `root`; EXIF orientation is ignored, as in ImageNet.

    The labels 0 .. C - 1 of a set of 200 classes are the ranks of the wnids, as the release counts class folders;
    those of a set of all classes are the official numbers, whichever folders are there. `class_ids` are the wnids and
    `class_names` the names in words.

    Raises DataError when the layout is not that of the archive.
    """

    n_images: ClassVar[int]
    """Images of the complete set."""
    n_classes: ClassVar[int] = _N_CLASSES
    folders: Sequence[str]
    """Names that the folder of the unpacked archive may have inside `root`."""
    layout: ClassVar[str]
    """Expected content of `root`."""
    numbered: ClassVar[bool] = False
    """Whether folders are called by class numbers instead of wnids."""

    def __init__(self, root: str | os.PathLike[str], **transforms: Unpack[Transforms]) -> None:
        super().__init__(**transforms)
        self.root = root = _find_folder(root, self.folders)
        scan = find_images(root, advice=f"{self.kind} expects {self.layout}")
        self._paths, self._sizes = scan.paths, scan.sizes
        official = np.array(self._official_classes(scan.paths), dtype=np.int64)
        present = np.unique(official)
        self._set_classes(range(_N_CLASSES) if self.n_classes == _N_CLASSES else present.tolist())
        self._targets = np.searchsorted(self.class_mapping, official)
        if len(present) > self.n_classes:
            raise DataError(
                f"{root} holds {len(present)} classes and {self.kind} has {self.n_classes}; is it another data set?"
            )
        if len(self) != self.n_images or len(present) != self.n_classes:
            logger.warning(
                "%s in %s holds %d of %d images and %d of %d classes",
                *(self.kind, root, len(self), self.n_images, len(present), self.n_classes),
            )

    def _official_classes(self, paths: PathTable) -> list[int]:
        numbers: dict[str, int] = {}
        official = []
        for path in paths:
            folder, slash, _ = path.partition("/")
            if not slash:
                raise DataError(f"{path} in {self.root} lies in no class folder; {self.kind} expects {self.layout}")
            if folder not in numbers:
                number = _class_number(folder) if self.numbered else number_of_wnid(folder)
                if number is None:
                    raise DataError(
                        f"the folder {folder} in {self.root} names no class of ImageNet-1k; "
                        f"{self.kind} expects {self.layout}"
                    )
                numbers[folder] = number
            official.append(numbers[folder])
        return official


class ImageNetA(_TestSet):
    """7,500 natural photographs that a ResNet-50 gets wrong, of 200 classes."""

    kind, n_images, n_classes = "ImageNetA", 7_500, 200
    folders = ("imagenet-a",)
    layout = "imagenet-a/<wnid>/*.jpg, as imagenet-a.tar unpacks"


class ImageNetR(_TestSet):
    """30,000 paintings, toys, tattoos and other renditions, of 200 classes that are not those of ImageNet-A."""

    kind, n_images, n_classes = "ImageNetR", 30_000, 200
    folders = ("imagenet-r",)
    layout = "imagenet-r/<wnid>/*.jpg, as imagenet-r.tar unpacks"


class ImageNetSketch(_TestSet):
    """50,889 black-and-white drawings of all 1,000 classes."""

    kind, n_images = "ImageNetSketch", 50_889
    folders = ("sketch", "ImageNet-Sketch", "imagenet-sketch")
    layout = "sketch/<wnid>/*.JPEG, as ImageNet-Sketch.zip unpacks"


class ImageNetV2(_TestSet):
    """10,000 new photographs of all 1,000 classes, collected as ImageNet's validation set was.

    The variants differ in how often human annotators chose the label: `matched-frequency` (as often as in ImageNet, the
    one that papers report), `threshold-0.7` and `top-images`.
    """

    kind, n_images, numbered = "ImageNetV2", 10_000, True
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
        **transforms: Unpack[Transforms],
    ) -> None:
        if variant not in self.variants:
            raise DataError(f"ImageNetV2 has no variant {variant!r}; write one of {', '.join(self.variants)}")
        self.variant = variant
        self.folders = self.variants[variant]
        others = [name for other, names in self.variants.items() if other != variant for name in names]
        if os.path.basename(os.path.abspath(root)) in others:
            raise DataError(f"{os.path.abspath(root)} is not the variant {variant} of ImageNetV2; name its own variant")
        super().__init__(root, **transforms)


class ImageNetC(_OfficialClasses, NamedFiles):
    """The images of one corruption, or of all 15, at one severity or at all five; labels are the official numbers.

    `parts` lists the `(corruption, severity)` that were chosen and `part_numbers` (int64 `[S]`) says which of them each
    image belongs to, so that features extracted in one go give the error of every part. The archives are groups of
    corruptions (blur.tar, noise.tar, ...); whether they were unpacked into one folder or each into one of its own
    (`root/blur/defocus_blur/...`), both are found. Raises DataError when a part is missing or laid out in another way.
    """

    kind = "ImageNetC"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        corruption: str | None = None,
        severity: int | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(**transforms)
        known = {**CORRUPTIONS, **EXTRA_CORRUPTIONS}
        if corruption is not None and corruption not in known:
            raise DataError(f"ImageNetC has no corruption {corruption!r}; write one of {', '.join(known)}, or none")
        if severity is not None and severity not in SEVERITIES:
            raise DataError(f"ImageNetC has no severity {severity}; write a number from 1 to 5, or none for all")
        self.root = _find_folder(root, ("ImageNet-C", "imagenet-c"))
        names = list(CORRUPTIONS) if corruption is None else [corruption]
        places = {name: _inside(self.root, (name, f"{known[name]}/{name}")) for name in names}
        missing = [name for name, folder in places.items() if folder is None]
        if missing:
            raise DataError(
                f"{self.root} lacks {len(missing)} of {len(names)} corruptions ({', '.join(missing)}); "
                f"expected is {_C_LAYOUT}, and one corruption alone is corruption=NAME"
            )
        severities = SEVERITIES if severity is None else (severity,)
        self.parts = [(name, level) for name in names for level in severities]
        self._folders = [os.path.join(places[name] or "", str(level)) for name, level in self.parts]
        for (_, level), folder in zip(self.parts, self._folders, strict=True):
            if not os.path.isdir(folder):
                raise DataError(f"there is no severity {level} in {os.path.dirname(folder)}; expected is {_C_LAYOUT}")
        self._set_classes(range(_N_CLASSES))

        scans = [scan_folder(folder) for folder in self._folders]
        counts = [len(scan.paths) for scan in scans]
        warn_of_others(self.root, sum((Counter(scan.other) for scan in scans), Counter[str]()))
        for (name, level), count in zip(self.parts, counts, strict=True):
            if count != _C_IMAGES:
                logger.warning("ImageNetC %s %d in %s holds %d of %d images", name, level, self.root, count, _C_IMAGES)
        self._paths = PathTable(path for scan in scans for path in scan.paths)  # relative to the folder of the part
        if not len(self._paths):
            raise DataError(f"no image was found in {self.root}; expected is {_C_LAYOUT}")
        self._sizes = np.concatenate([scan.sizes for scan in scans])
        self.part_numbers = np.repeat(np.arange(len(scans), dtype=np.int64), counts)
        self._targets = np.array([self._class_of(path) for path in self._paths], dtype=np.int64)

    def path_of(self, index: int) -> str:
        return os.path.join(self._folders[self.part_numbers[index]], self._paths[index])

    def fingerprint(self) -> str:
        parts = [f"{name}/{level}" for name, level in self.parts]
        return digest(self.kind, *parts, *self._paths.arrays, self._sizes, self.part_numbers)

    def _class_of(self, path: str) -> int:
        wnid, slash, _ = path.partition("/")
        number = number_of_wnid(wnid) if slash else None
        if number is None:
            raise DataError(f"{path} in {self.root} lies in no folder of an ImageNet-1k class; expected is {_C_LAYOUT}")
        return number


class ImageNetReaL(_OfficialClasses, FileDataset):
    """The VAL split of `ImageNet(root=..., extra=...)` with ReaL's label sets from `labels`, or `root/real.json`.

    The target of an image is its original label, as official number whichever classes are there; `label_sets` (int64
    `[S, A]`, padded with -1) are ReaL's, for `dinov2.eval.metrics.real_accuracy`. The file is a list of 50,000
    lists of official class numbers, in the order of the image numbers; an empty list is an image on which the
    annotators did not agree, and which the metric leaves out (Beyer et al. 2020, "Are we done with ImageNet?").

    Raises DataError when the file is missing or no list of lists of class numbers.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        labels: str | os.PathLike[str] | None = None,
        extra: str | os.PathLike[str] | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(**transforms)
        self._images = ImageNet(split=ImageNet.Split.VAL, root=root, extra=extra)
        self.root = self._images.root
        self._set_classes(range(_N_CLASSES))
        self._targets = self._official_targets()
        file = self._find_labels() if labels is None else os.path.abspath(labels)
        label_lists = _read_label_lists(file)
        paths = [os.path.relpath(self.path_of(index), self.root) for index in range(len(self))]
        rows = [self._images.split.parse_image_relpath(path)[1] - 1 for path in paths]
        if max(rows) >= len(label_lists):
            raise DataError(
                f"{file} has labels of {len(label_lists)} images and none of image {max(rows) + 1}; "
                f"expected is the {_REAL_FILE} of ReaL, with a list for each of the 50,000"
            )
        chosen = [label_lists[row] for row in rows]
        # One dtype whatever the lists hold; numpy's own padding of an empty list would make it float64.
        self.label_sets = np.full((len(chosen), max(1, *map(len, chosen))), -1, dtype=np.int64)
        for row, numbers in zip(self.label_sets, chosen, strict=True):
            row[: len(numbers)] = numbers

    def __len__(self) -> int:
        return len(self._images)

    def path_of(self, index: int) -> str:
        return self._images.path_of(index)

    def get_target(self, index: int) -> int:
        return int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        return self._targets

    def fingerprint(self) -> str:
        return digest("ImageNetReaL", self._images.fingerprint(), self._targets, self.label_sets)

    def _official_targets(self) -> np.ndarray:  # int64 [S]
        targets = self._images.get_targets()
        assert targets is not None
        present = np.unique(targets)
        wnids = [self._images.find_class_id(int(number)) for number in present]
        numbers = [number_of_wnid(wnid) for wnid in wnids]
        if None in numbers:
            raise DataError(
                f"{wnids[numbers.index(None)]} in {self.root} is no class of ImageNet-1k, so ReaL has no labels for it"
            )
        return np.array(numbers, dtype=np.int64)[np.searchsorted(present, targets)]

    def _find_labels(self) -> str:
        inside = [os.path.join(self.root, *folder, _REAL_FILE) for folder in ((), ("val",), ("reassessed-imagenet",))]
        file = next((path for path in inside if os.path.isfile(path)), None)
        if file is None:
            raise DataError(
                f"there is no {_REAL_FILE} in {self.root}; put the file of ReaL's authors there, or give labels=FILE"
            )
        return file


def _read_label_lists(file: str) -> list[list[int]]:
    try:
        rows = json.loads(read_bytes(file))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}); expected is the {_REAL_FILE} of ReaL") from error
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(_is_class, row)) for row in rows):
        raise DataError(
            f"{file} is no list of lists of class numbers from 0 to 999; expected is the {_REAL_FILE} of ReaL"
        )
    return rows


def _is_class(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < _N_CLASSES


def _class_number(folder: str) -> int | None:
    return int(folder) if folder.isascii() and folder.isdecimal() and int(folder) < _N_CLASSES else None


def _inside(root: str, names: Sequence[str]) -> str | None:
    """The first folder of one of the given names in `root`."""
    return next((path for path in (os.path.join(root, name) for name in names) if os.path.isdir(path)), None)


def _find_folder(root: str | os.PathLike[str], names: Sequence[str]) -> str:
    """The first folder of one of the given names in `root`, else `root` itself; absolute."""
    root = os.path.abspath(root)
    return _inside(root, names) or root
