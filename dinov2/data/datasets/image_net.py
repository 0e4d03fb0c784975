"""ImageNet-1k in the layout and with the metadata files of the public release.

    root/labels.txt                            wnid,name per line, in class order (optional here)
    root/train/<wnid>/<wnid>_<n>.JPEG
    root/val/<wnid>/ILSVRC2012_val_<8 digits>.JPEG      or flat, root/val/ILSVRC2012_val_*.JPEG, with a list of labels
    root/test/ILSVRC2012_test_<8 digits>.JPEG

    extra/entries-<SPLIT>.npy, class-ids-<SPLIT>.npy, class-names-<SPLIT>.npy    written by `dump_extra`

`extra` may be left out: then the folders are listed instead. Subsets are welcome: an unexpected number of images is
logged, not refused. Class numbers are ranks among the class folders of train and val together, so that both splits of
a subset agree; for the whole set that is the official numbering.
"""

import logging
import os
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dinov2.data.datasets.base import FileDataset, digest, make_extra
from dinov2.data.datasets.image_net_labels import class_folders, class_names_of, flat_val_labels
from dinov2.data.datasets.scanning import scan_folder
from dinov2.errors import DataError
from dinov2.whole_files import replacing

__all__ = ["ImageNet"]

logger = logging.getLogger("dinov2")

_COLUMNS = [("actual_index", "<u4"), ("class_index", "<u4")]
_NO_CLASS = 0xFFFFFFFF  # class number of test images in the metadata: -1 as an unsigned integer


class _Split(Enum):
    """A part of ImageNet; `length` is the number of images of the complete part."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        """Images of the complete split."""
        return {_Split.TRAIN: 1_281_167, _Split.VAL: 50_000, _Split.TEST: 100_000}[self]

    def get_dirname(self, class_id: str | None = None) -> str:
        """Folder of the split, or of one of its classes, relative to the root."""
        return self.value if class_id is None else f"{self.value}/{class_id}"

    def get_image_relpath(self, actual_index: int, class_id: str | None = None) -> str:
        """Path of an image relative to the root, from the number in its name and the wnid of its class."""
        if self is _Split.TRAIN:
            return f"{self.get_dirname(class_id)}/{class_id}_{actual_index}.JPEG"
        name = f"ILSVRC2012_{self.value}_{actual_index:08d}.JPEG"
        return f"{self.get_dirname(None if self is _Split.TEST else class_id)}/{name}"

    def parse_image_relpath(self, image_relpath: str) -> tuple[str, int]:
        """`(class_id, actual_index)` of a path relative to the root; the class of a flat file is "".

        Raises DataError when the file is not named as ImageNet names its files.
        """
        folder, _, name = image_relpath.replace(os.sep, "/").rpartition("/")
        stem = name.rpartition(".")[0]
        number = stem.rpartition("_")[2]
        class_id = folder.rpartition("/")[2] if folder != self.value else ""
        if not number.isdecimal() or self.get_image_relpath(int(number), class_id or None) != f"{folder}/{name}":
            raise DataError(
                f"{image_relpath} is not named as an image of ImageNet's {self.value} split, such as "
                f"{self.get_image_relpath(1, 'n01440764')}; for images with names of their own write folder:PATH"
            )
        return class_id, int(number)


class _Metadata(NamedTuple):
    """What is known of a split without opening an image."""

    entries: np.ndarray
    """One row an image, with at least `actual_index` and `class_index`."""
    class_ids: np.ndarray | None
    """wnids by class number; None on TEST."""
    class_names: np.ndarray | None
    flat: bool
    """Whether the validation images lie in no class folders."""


class ImageNet(FileDataset):
    """One split of ImageNet below `root`, with metadata from `extra` where it was dumped.

    Nothing is read before it is needed, so that `ImageNet(...).dump_extra()` works without metadata. EXIF orientation
    is ignored, as in the public release. Targets of the TEST split are None.
    """

    Split: ClassVar[type[_Split]] = _Split

    def __init__(
        self,
        *,
        split: "_Split",
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None = None,
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform, transforms=transforms)
        self._split = split
        self.root = os.path.abspath(root)
        self._extra = None if extra is None else os.path.abspath(extra)
        self._loaded: _Metadata | None = None

    @property
    def split(self) -> "_Split":
        """The split this object reads."""
        return self._split

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """Names by class number; None on TEST."""
        names = self._metadata().class_names
        return None if names is None else [str(name) for name in names]

    def __len__(self) -> int:
        return len(self._metadata().entries)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled by value, a copy of the whole table in each worker; it is opened again there.
        from_files = self._loaded is not None and isinstance(self._loaded.entries, np.memmap)
        return {**self.__dict__, "_loaded": None if from_files else self._loaded}

    def path_of(self, index: int) -> str:
        entries, class_ids, _, flat = self._metadata()
        entry, class_id = entries[index], None
        if class_ids is not None and not flat:
            named = "class_id" in (entries.dtype.names or ())
            class_id = str(entry["class_id"] if named else class_ids[entry["class_index"]])
        return os.path.join(self.root, *self.split.get_image_relpath(int(entry["actual_index"]), class_id).split("/"))

    def get_target(self, index: int) -> int | None:
        return None if self.split is _Split.TEST else int(self._metadata().entries[index]["class_index"])

    def get_targets(self) -> np.ndarray | None:
        return None if self.split is _Split.TEST else self._metadata().entries["class_index"].astype(np.int64)

    def get_class_id(self, index: int) -> str | None:
        """wnid of image `index`; None on TEST."""
        target = self.get_target(index)
        return None if target is None else self.find_class_id(target)

    def get_class_name(self, index: int) -> str | None:
        """Name of the class of image `index`; None on TEST."""
        target = self.get_target(index)
        return None if target is None else self.find_class_name(target)

    def find_class_id(self, class_index: int) -> str:
        """wnid of a class number. Raises DataError on TEST."""
        return str(_present(self._metadata().class_ids)[class_index])

    def find_class_name(self, class_index: int) -> str:
        """Name of a class number. Raises DataError on TEST."""
        return str(_present(self._metadata().class_names)[class_index])

    def fingerprint(self) -> str:
        # Names and classes, not sizes: looking at a million files would take minutes on a network disk.
        entries = self._metadata().entries
        return digest("ImageNet", self.split.value, entries["actual_index"], entries["class_index"])

    def dump_extra(self) -> None:
        """List the images and write the release's metadata files for this split into `extra`, replacing older ones.

        Raises DataError when `extra` was not given or is no folder, or a file is not named as ImageNet names its files.
        """
        make_extra(self._extra)
        if self.split is _Split.TEST and not os.path.isdir(os.path.join(self.root, "test")):
            # The release writes this table without looking at any file.
            logger.warning("%s has no test folder; the complete split is listed without its images", self.root)
            listed = _Metadata(_entries(np.arange(1, self.split.length + 1), _NO_CLASS), None, None, False)
        else:
            listed = self._scan()
        entries, class_ids, class_names, _ = listed
        widths = [0 if table is None else max(map(len, table)) for table in (class_ids, class_names)]
        columns = [*_COLUMNS, ("class_id", f"U{widths[0]}"), ("class_name", f"U{widths[1]}")]
        rows = np.zeros(len(entries), dtype=np.dtype(columns))
        for column in ("actual_index", "class_index"):
            rows[column] = entries[column]
        self._loaded = None
        if class_ids is not None and class_names is not None:
            rows["class_id"] = class_ids[entries["class_index"]]
            rows["class_name"] = class_names[entries["class_index"]]
            _save(self._extra_path("class-ids"), class_ids)
            _save(self._extra_path("class-names"), class_names)
        _save(self._extra_path("entries"), rows)

    def _extra_path(self, kind: str) -> str:
        return os.path.join(self._extra or "", f"{kind}-{self.split.value.upper()}.npy")

    def _metadata(self) -> _Metadata:
        if self._loaded is None:
            dumped = self._extra is not None and os.path.isfile(self._extra_path("entries"))
            self._loaded = self._read_extra() if dumped else self._scan()
            found, complete = len(self._loaded.entries), self.split.length
            if found != complete:
                logger.warning("ImageNet %s in %s holds %d of %d images", self.split.name, self.root, found, complete)
        return self._loaded

    def _read_extra(self) -> _Metadata:
        entries = _load(self._extra_path("entries"))
        if not {"actual_index", "class_index"} <= set(entries.dtype.names or ()):
            raise DataError(f"{self._extra_path('entries')} holds no ImageNet entries; run dump_extra() again")
        ids = names = None
        if self.split is not _Split.TEST:
            ids, names = _load(self._extra_path("class-ids")), _load(self._extra_path("class-names"))
        return _Metadata(entries, ids, names, self._is_flat(entries))

    def _is_flat(self, entries: np.ndarray) -> bool:
        if self.split is not _Split.VAL or not len(entries):
            return False
        first = self.split.get_image_relpath(int(entries[0]["actual_index"]))
        return os.path.isfile(os.path.join(self.root, first))

    def _scan(self) -> _Metadata:
        scan = scan_folder(os.path.join(self.root, self.split.value))
        if not len(scan.paths):
            raise DataError(
                f"no image was found in {os.path.join(self.root, self.split.value)}; "
                f"root is the folder that holds train, val and test"
            )
        parsed = [self.split.parse_image_relpath(f"{self.split.value}/{path}") for path in scan.paths]
        numbers = np.array([number for _, number in parsed])
        if self.split is _Split.TEST:
            return _Metadata(_entries(numbers, _NO_CLASS), None, None, False)
        flat = parsed[0][0] == ""
        if any((class_id == "") != flat for class_id, _ in parsed):
            raise DataError(f"some validation images in {self.root} lie in class folders and some do not; move them")
        folders = class_folders(self.root)
        if flat:
            folders, labels = flat_val_labels(self.root, self._extra, folders)
            missing = [number for _, number in parsed if number not in labels]
            if missing:
                raise DataError(f"the list of validation labels has none for image {missing[0]}; complete the list")
            classes = [labels[number] for _, number in parsed]
        else:
            rank = {folder: index for index, folder in enumerate(folders)}
            classes = [rank[class_id] for class_id, _ in parsed]
        names = np.array(class_names_of(self.root, folders))
        return _Metadata(_entries(numbers, classes), np.array(folders), names, flat)


def _entries(numbers: np.ndarray, classes: int | list[int]) -> np.ndarray:
    """Rows of image numbers and class numbers, without the texts that make the metadata files large."""
    entries = np.empty(len(numbers), dtype=np.dtype(_COLUMNS))
    entries["actual_index"], entries["class_index"] = numbers, classes
    return entries


def _present(table: np.ndarray | None) -> np.ndarray:
    if table is None:
        raise DataError("the test images of ImageNet have no classes; ask the TRAIN or VAL split")
    return table


def _load(path: str) -> np.ndarray:
    try:
        loaded: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the ImageNet metadata {path} cannot be read ({error}); run dump_extra() again") from error
    return loaded


def _save(path: str, array: np.ndarray) -> None:
    # Renamed into place, because another process may have the old file mapped.
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, array)
