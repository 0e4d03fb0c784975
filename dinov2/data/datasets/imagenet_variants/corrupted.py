"""ImageNet-C: the validation images under 15 corruptions at 5 severities (Hendrycks and Dietterich 2019).

    root/<corruption>/<severity>/<wnid>/ILSVRC2012_val_<8 digits>.JPEG

The archives are groups of corruptions (blur.tar, noise.tar, ...); whether they were unpacked into one folder or each
into one of its own (`root/blur/defocus_blur/...`), both are found. The images are 224 x 224 already: evaluate them
without resizing, as `dinov2.data.eval_transform` does with images of the size of the crop.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.base import FileDataset, digest
from dinov2.data.datasets.imagenet_variants.class_folders import find_folder, official_class
from dinov2.data.datasets.scanning import PathTable, scan_folder
from dinov2.errors import DataError

__all__ = ["CORRUPTIONS", "EXTRA_CORRUPTIONS", "SEVERITIES", "ImageNetC"]

logger = logging.getLogger("dinov2")

CORRUPTIONS = {
    "gaussian_noise": "noise",
    "shot_noise": "noise",
    "impulse_noise": "noise",
    "defocus_blur": "blur",
    "glass_blur": "blur",
    "motion_blur": "blur",
    "zoom_blur": "blur",
    "snow": "weather",
    "frost": "weather",
    "fog": "weather",
    "brightness": "weather",
    "contrast": "digital",
    "elastic_transform": "digital",
    "pixelate": "digital",
    "jpeg_compression": "digital",
}
"""The corruptions of the benchmark, in the order of its paper, and the archive that holds each."""

EXTRA_CORRUPTIONS = dict.fromkeys(("speckle_noise", "gaussian_blur", "spatter", "saturate"), "extra")
"""Four more, meant for choosing settings; no part of the mean corruption error."""

SEVERITIES = (1, 2, 3, 4, 5)

_N_IMAGES = 50_000  # of a complete part
_LAYOUT = "<corruption>/<severity>/<wnid>/*.JPEG, as the archives of ImageNet-C unpack"


class ImageNetC(FileDataset):
    """The images of one corruption, or of all 15, at one severity or at all five; labels are the official numbers.

    `parts` lists the `(corruption, severity)` that were asked for and `part_numbers` (int64 `[S]`) says which of them
    each image belongs to, so that features extracted in one go give the error of every part. `class_mapping` is the
    identity: all 1,000 classes. Raises DataError when a part is missing or laid out in another way.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        corruption: str | None = None,
        severity: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        known = {**CORRUPTIONS, **EXTRA_CORRUPTIONS}
        if corruption is not None and corruption not in known:
            raise DataError(f"ImageNetC has no corruption {corruption!r}; write one of {', '.join(known)}, or none")
        if severity is not None and severity not in SEVERITIES:
            raise DataError(f"ImageNetC has no severity {severity}; write a number from 1 to 5, or none for all")
        self.root = find_folder(root, ("ImageNet-C", "imagenet-c"))
        names = list(CORRUPTIONS) if corruption is None else [corruption]
        folders = {name: self._folder_of(name, known[name]) for name in names}
        missing = [name for name, folder in folders.items() if folder is None]
        if missing:
            raise DataError(
                f"{self.root} lacks {len(missing)} of {len(names)} corruptions ({', '.join(missing)}); "
                f"expected is {_LAYOUT}, and one corruption alone is corruption=NAME"
            )
        severities = SEVERITIES if severity is None else (severity,)
        self.parts = [(name, level) for name in names for level in severities]
        self.class_ids = [row.wnid for row in imagenet_classes.IMAGENET_CLASSES]
        self.class_names = [row.name for row in imagenet_classes.IMAGENET_CLASSES]
        self.class_mapping = np.arange(len(imagenet_classes.IMAGENET_CLASSES), dtype=np.int64)

        scans = [scan_folder(self._part(folders[name], level)) for name, level in self.parts]
        counts = [len(scan.paths) for scan in scans]
        self._part_folders = [
            os.path.relpath(self._part(folders[name], level), self.root) for name, level in self.parts
        ]
        for (name, level), count in zip(self.parts, counts, strict=True):
            if count != _N_IMAGES:
                logger.warning("ImageNetC %s %d in %s holds %d of %d images", name, level, self.root, count, _N_IMAGES)
        self._paths = PathTable(path for scan in scans for path in scan.paths)  # relative to the folder of the part
        if not len(self._paths):
            raise DataError(f"no image was found in {self.root}; expected is {_LAYOUT}")
        self._sizes = np.concatenate([scan.sizes for scan in scans])
        self.part_numbers = np.repeat(np.arange(len(scans), dtype=np.int64), counts)
        self._targets = np.array([self._class_of(path) for path in self._paths], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        part = self._part_folders[self.part_numbers[index]]
        return os.path.join(self.root, part, *self._paths[index].split("/"))

    def get_target(self, index: int) -> int:
        return int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        return self._targets

    def fingerprint(self) -> str:
        parts = [f"{name}/{level}" for name, level in self.parts]
        return digest("ImageNetC", *parts, *self._paths.arrays, self._sizes, self.part_numbers)

    def _folder_of(self, name: str, group: str) -> str | None:
        inside = [os.path.join(self.root, name), os.path.join(self.root, group, name)]
        return next((folder for folder in inside if os.path.isdir(folder)), None)

    def _part(self, folder: str | None, severity: int) -> str:
        assert folder is not None
        part = os.path.join(folder, str(severity))
        if not os.path.isdir(part):
            raise DataError(f"there is no severity {severity} in {folder}; expected is {_LAYOUT}")
        return part

    def _class_of(self, path: str) -> int:
        wnid, slash, _ = path.partition("/")
        number = official_class(wnid) if slash else None
        if number is None:
            raise DataError(f"{path} in {self.root} lies in no folder of an ImageNet-1k class; expected is {_LAYOUT}")
        return number
