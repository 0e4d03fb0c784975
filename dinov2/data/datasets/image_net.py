"""ImageNet-1k and ImageNet-22k in the layouts and with the metadata files of the public release.

    root/labels.txt                            wnid,name per line, in class order (optional here)
    root/train/<wnid>/<wnid>_<n>.JPEG
    root/val/<wnid>/ILSVRC2012_val_<8 digits>.JPEG      or flat, root/val/ILSVRC2012_val_*.JPEG, with a list of labels
    root/test/ILSVRC2012_test_<8 digits>.JPEG
    extra/entries-<SPLIT>.npy, class-ids-<SPLIT>.npy, class-names-<SPLIT>.npy

    root/<class>.tar                           ImageNet-22k, or anything packed the same way: plain tars of images,
                                               gzip-compressed or not
    extra/entries.npy, class-ids.npy

`dump_extra` writes the files in `extra`, which may be left out: then folders or the headers of tars are listed.
Subsets are welcome: an unexpected number of images is logged, not refused. Class numbers of ImageNet-1k are ranks among
the class folders of train and val together, so that both splits of a subset agree; for the whole set that is the
official numbering.

In the index of tars, offsets are 64-bit, because tars above 4 GiB exist. Column names and the meaning of offsets are
the release's: an entry is the member with a 512-byte header before its data. So an index written there is read here,
and the other way round as long as its offsets fit.
"""

import gzip
import logging
import os
import re
import tarfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import ClassVar, NamedTuple, Unpack

import numpy as np

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.base import EncodedDataset, FileDataset, Transforms, digest, read_bytes
from dinov2.data.datasets.imagenet_classes import name_classes, read_labels_txt
from dinov2.data.datasets.scanning import ending, find_images, warn_of_others
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.errors import DataError
from dinov2.whole_files import atomic_write

__all__ = ["ImageNet", "ImageNet22k"]

logger = logging.getLogger("dinov2")

_COLUMNS = [("actual_index", "<u4"), ("class_index", "<u4")]
_NO_CLASS = 0xFFFFFFFF  # class number of test images in the metadata: -1 as an unsigned integer
_LABEL_LISTS = (
    "LOC_val_solution.csv",  # ImageId,PredictionString
    "imagenet_2012_validation_synset_labels.txt",  # a wnid a line, in order
    "val.txt",  # file name and class number from 0
    "val_labels.txt",  # any of these forms
)
_TAR_HEADER = 512
_GZIP_MAGIC = b"\x1f\x8b"
_BROKEN_MEMBERS = frozenset({"n06470073_47249.JPEG"})  # broken in the published archive
_TAR_COLUMNS = ("class_index", "start_offset", "end_offset")


class _Index(NamedTuple):
    """The images and classes of a set, known without opening an image."""

    entries: np.ndarray
    """One row an image, with at least `class_index`."""
    class_ids: np.ndarray | None
    """wnids by class number; None on TEST."""
    class_names: np.ndarray | None
    flat: bool = False
    """Whether the validation images lie in no class folders."""


class _IndexedDataset(EncodedDataset):
    """Images with an index that is read or made at first use, so that `dump_extra` works without one."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(**transforms)
        self.root = os.path.abspath(root)
        self._extra = None if extra is None else os.path.abspath(extra)
        self._loaded: _Index | None = None

    @abstractmethod
    def _load_index(self) -> _Index: ...

    def _index(self) -> _Index:
        if self._loaded is None:
            self._loaded = self._load_index()
        return self._loaded

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled by value, a copy of the whole table in each worker; it is opened again there.
        from_files = self._loaded is not None and isinstance(self._loaded.entries, np.memmap)
        return {**self.__dict__, "_loaded": None if from_files else self._loaded}

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """Names by class number; None on TEST."""
        return _texts(self._index().class_names)

    @property
    def class_ids(self) -> list[str] | None:  # type: ignore[override]
        """wnids, or names of the tars, by class number; None on TEST."""
        return _texts(self._index().class_ids)

    def __len__(self) -> int:
        return len(self._index().entries)

    def get_target(self, index: int) -> int | None:
        loaded = self._index()
        return None if loaded.class_ids is None else int(loaded.entries[index]["class_index"])

    def get_targets(self) -> np.ndarray | None:
        loaded = self._index()
        return None if loaded.class_ids is None else loaded.entries["class_index"].astype(np.int64)

    def get_class_id(self, index: int) -> str | None:
        """wnid or tar of image `index`; None on TEST."""
        target = self.get_target(index)
        return None if target is None else self.find_class_id(target)

    def find_class_id(self, class_index: int) -> str:
        """wnid or tar of a class number. Raises DataError on TEST."""
        return str(_require_classes(self._index().class_ids)[class_index])

    def _make_extra(self) -> None:
        if self._extra is None:
            raise DataError("dump_extra has nowhere to write; give extra=FOLDER when the data set is made")
        try:
            os.makedirs(self._extra, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the folder extra={self._extra} cannot be made ({error.strerror}); give another one"
            ) from error

    def _extra_file(self, name: str) -> str:
        return os.path.join(self._extra or "", name)


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


class ImageNet(_IndexedDataset, FileDataset):
    """One split of ImageNet-1k below `root`, with metadata from `extra` where it was dumped.

    EXIF orientation is ignored, as in the public release. Targets of the TEST split are None.
    """

    Split: ClassVar[type[_Split]] = _Split

    def __init__(
        self,
        *,
        split: "_Split",
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(root, extra, **transforms)
        self._split = split

    @property
    def split(self) -> "_Split":
        """The split this object reads."""
        return self._split

    def path_of(self, index: int) -> str:
        entries, class_ids, _, flat = self._index()
        entry, class_id = entries[index], None
        if class_ids is not None and not flat:
            named = "class_id" in (entries.dtype.names or ())
            class_id = str(entry["class_id"] if named else class_ids[entry["class_index"]])
        return os.path.join(self.root, *self.split.get_image_relpath(int(entry["actual_index"]), class_id).split("/"))

    def get_class_name(self, index: int) -> str | None:
        """Name of the class of image `index`; None on TEST."""
        target = self.get_target(index)
        return None if target is None else self.find_class_name(target)

    def find_class_name(self, class_index: int) -> str:
        """Name of a class number. Raises DataError on TEST."""
        return str(_require_classes(self._index().class_names)[class_index])

    def fingerprint(self) -> str:
        # Names and classes, not sizes: looking at a million files would take minutes on a network disk.
        entries = self._index().entries
        return digest("ImageNet", self.split.value, entries["actual_index"], entries["class_index"])

    def dump_extra(self) -> None:
        """List the images and write the release's metadata files for this split into `extra`, replacing older ones.

        Raises DataError when `extra` was not given or is no folder, or a file is not named as ImageNet names its files.
        """
        self._make_extra()
        if self.split is _Split.TEST and not os.path.isdir(os.path.join(self.root, "test")):
            # The release writes this table without looking at any file.
            logger.warning("%s has no test folder; the complete split is listed without its images", self.root)
            listed = _Index(_make_entries(np.arange(1, self.split.length + 1), _NO_CLASS), None, None)
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
            _save(self._file("class-ids"), class_ids)
            _save(self._file("class-names"), class_names)
        _save(self._file("entries"), rows)

    def _file(self, kind: str) -> str:
        return self._extra_file(f"{kind}-{self.split.value.upper()}.npy")

    def _load_index(self) -> _Index:
        dumped = self._extra is not None and os.path.isfile(self._file("entries"))
        loaded = self._read_extra() if dumped else self._scan()
        count, complete = len(loaded.entries), self.split.length
        if count != complete:
            logger.warning("ImageNet %s in %s holds %d of %d images", self.split.name, self.root, count, complete)
        return loaded

    def _read_extra(self) -> _Index:
        entries = _load(self._file("entries"))
        if not {"actual_index", "class_index"} <= set(entries.dtype.names or ()):
            raise DataError(f"{self._file('entries')} holds no ImageNet entries; run dump_extra() again")
        if self.split is _Split.TEST:
            return _Index(entries, None, None)
        flat = False
        if self.split is _Split.VAL and len(entries):
            first = self.split.get_image_relpath(int(entries[0]["actual_index"]))
            flat = os.path.isfile(os.path.join(self.root, first))
        return _Index(entries, _load(self._file("class-ids")), _load(self._file("class-names")), flat)

    def _scan(self) -> _Index:
        folder = os.path.join(self.root, self.split.value)
        scan = find_images(folder, advice="root is the folder that holds train, val and test")
        parsed = [self.split.parse_image_relpath(f"{self.split.value}/{path}") for path in scan.paths]
        numbers = np.array([number for _, number in parsed])
        if self.split is _Split.TEST:
            return _Index(_make_entries(numbers, _NO_CLASS), None, None)
        flat = parsed[0][0] == ""
        if any((class_id == "") != flat for class_id, _ in parsed):
            raise DataError(f"some validation images in {self.root} lie in class folders and some do not; move them")
        class_ids = _class_folders(self.root)
        if flat:
            class_ids, labels = _read_flat_labels(self.root, self._extra, class_ids)
            missing = [number for _, number in parsed if number not in labels]
            if missing:
                raise DataError(f"the list of validation labels has none for image {missing[0]}; complete the list")
            classes = [labels[number] for _, number in parsed]
        else:
            rank = {class_id: index for index, class_id in enumerate(class_ids)}
            classes = [rank[class_id] for class_id, _ in parsed]
        names = np.array(name_classes(self.root, class_ids))
        return _Index(_make_entries(numbers, classes), np.array(class_ids), names, flat)


class ImageNet22k(_IndexedDataset):
    """The images in all `root/*.tar`, classes in sorted order of the tars' names; the index from `extra` if dumped.

    `mmap_cache_size` is accepted for the release's sake and has no effect: no tar stays open.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None = None,
        mmap_cache_size: int = 16,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(root, extra, **transforms)

    def path_of(self, index: int) -> str:
        return f"{self._tar(index)}/{self._index().entries[index]['filename']}"

    def get_image_data(self, index: int) -> bytes:
        entry = self._index().entries[index]
        start, end = int(entry["start_offset"]) + _TAR_HEADER, int(entry["end_offset"])
        try:
            # Opened for each image: no descriptors to run out of, nothing to share by fork or to pickle.
            with open(self._tar(index), "rb") as tar:
                tar.seek(start)
                data = tar.read(end - start)
            if len(data) < end - start:
                raise DataError(f"{self.path_of(index)} is cut short; was the tar changed after its index was made?")
            return gzip.decompress(data) if data[:2] == _GZIP_MAGIC else data
        except (OSError, EOFError) as error:
            raise DataError(f"{self.path_of(index)} cannot be read ({error})") from error

    def get_class_ids(self) -> np.ndarray:
        """Classes of all images, unicode `[S]`."""
        return _require_classes(self._index().class_ids)[self.get_targets()]

    def fingerprint(self) -> str:
        entries = self._index().entries
        return digest("ImageNet22k", "\n".join(self.class_ids or ()), *(entries[name] for name in _TAR_COLUMNS))

    def dump_extra(self) -> None:
        """Read the headers of all tars and write the index into `extra`. Raises DataError when that is no folder."""
        self._make_extra()
        index = self._read_tars()
        _save(self._extra_file("entries.npy"), index.entries)
        _save(self._extra_file("class-ids.npy"), _require_classes(index.class_ids))
        self._loaded = None

    def _tar(self, index: int) -> str:
        return os.path.join(self.root, f"{self.get_class_id(index)}.tar")

    def _load_index(self) -> _Index:
        if self._extra is None or not os.path.isfile(self._extra_file("entries.npy")):
            return self._read_tars()
        class_ids = _load(self._extra_file("class-ids.npy"))
        return _Index(_load(self._extra_file("entries.npy")), class_ids, class_ids)

    def _read_tars(self) -> _Index:
        if not os.path.isdir(self.root):
            raise DataError(f"the folder {self.root} does not exist; root is the folder that holds one tar a class")
        class_ids = sorted(name[: -len(".tar")] for name in os.listdir(self.root) if name.endswith(".tar"))
        rows: list[tuple[int, str, int, int, str]] = []
        other: Counter[str] = Counter()
        for number, class_id in enumerate(class_ids):
            path = os.path.join(self.root, f"{class_id}.tar")
            try:
                with tarfile.open(path, "r:") as tar:
                    members = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
            except (OSError, tarfile.TarError) as error:
                raise DataError(f"{path} cannot be read as a tar ({error}); replace or delete it") from error
            for name, start, size in members:
                if os.path.splitext(name)[1].lower() not in IMAGE_EXTENSIONS:
                    other[ending(name)] += 1
                elif os.path.basename(name) not in _BROKEN_MEMBERS:
                    rows.append((number, class_id, start - _TAR_HEADER, start + size, name))
        if not rows:
            raise DataError(f"no image was found in the {len(class_ids)} tars of {self.root}; root holds <class>.tar")
        warn_of_others(self.root, other)
        columns = [
            ("class_index", "<u4"),
            ("class_id", f"U{max(map(len, class_ids))}"),
            ("start_offset", "<i8"),
            ("end_offset", "<i8"),
            ("filename", f"U{max(len(row[4]) for row in rows)}"),
        ]
        names = np.array(class_ids)
        return _Index(np.array(rows, dtype=np.dtype(columns)), names, names)


def _make_entries(numbers: np.ndarray, classes: int | list[int]) -> np.ndarray:
    """Rows of image numbers and class numbers, without the texts that make the metadata files large."""
    entries = np.empty(len(numbers), dtype=np.dtype(_COLUMNS))
    entries["actual_index"], entries["class_index"] = numbers, classes
    return entries


def _texts(table: np.ndarray | None) -> list[str] | None:
    return None if table is None else [str(text) for text in table]


def _require_classes(table: np.ndarray | None) -> np.ndarray:
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
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, array)


def _class_folders(root: str) -> list[str]:
    """The class folders of train and val, sorted: a class's number is its position."""
    names: set[str] = set()
    for split in ("train", "val"):
        folder = os.path.join(root, split)
        if os.path.isdir(folder):
            names.update(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    return sorted(names)


def _read_flat_labels(root: str, extra: str | None, folders: Sequence[str]) -> tuple[list[str], Mapping[int, int]]:
    """Classes and the class number by image number, for validation images that lie in no class folders.

    One of `_LABEL_LISTS` is looked for in `root`, `root/val` and `extra`. Classes are those of the train folders, else
    of `labels.txt`, else all of ImageNet-1k; a list with a wnid of none of these names its own.
    """
    places = [folder for folder in (root, os.path.join(root, "val"), extra) if folder]
    lists = [os.path.join(folder, name) for folder in places for name in _LABEL_LISTS]
    path = next((path for path in lists if os.path.isfile(path)), None)
    if path is None:
        raise DataError(
            f"the validation images in {root}/val lie in no class folders and no list of their labels was found; "
            f"put one of {', '.join(_LABEL_LISTS)} into {root}"
        )
    labels: dict[int, str] = {}
    for line in read_bytes(path).decode("utf-8-sig").splitlines():
        fields = re.split(r"[,\s]+", line.strip())
        if fields == [""] or fields[0] == "ImageId":
            continue
        if len(fields) == 1 and not fields[0].isdecimal():
            labels[len(labels) + 1] = fields[0]
            continue
        number = re.search(r"ILSVRC2012_val_(\d{8})", fields[0])
        if number is None or len(fields) < 2:
            # A bare number is refused: the official kit counts classes in another order than everybody else.
            raise DataError(f"{line!r} in {path} is no validation label; write ILSVRC2012_val_00000001.JPEG n01440764")
        labels[int(number.group(1))] = fields[1]
    by_wnid = any(not label.isdecimal() for label in labels.values())
    known = list(folders) or sorted(read_labels_txt(root))
    classes = known or [wnid for wnid, _ in imagenet_classes.IMAGENET_CLASSES]
    if by_wnid and not known and not set(labels.values()) <= set(classes):
        classes = sorted(set(labels.values()))
    rank = {class_id if by_wnid else str(index): index for index, class_id in enumerate(classes)}
    unknown = sorted(set(labels.values()) - set(rank))
    if unknown:
        raise DataError(
            f"{path} names the class {unknown[0]}, which is none of the {len(classes)} known ones; "
            f"add the train folders or a labels.txt with all classes to {root}"
        )
    return classes, {number: rank[label] for number, label in labels.items()}
