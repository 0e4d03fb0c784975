"""Images in one tar a class, read in place: ImageNet-22k, or anything packed the same way.

    root/<class>.tar                  plain tars; members are images, gzip-compressed or not
    extra/entries.npy, class-ids.npy  the index, written by `dump_extra`; optional

The index is made by reading the tar headers, so that any selection of classes and images works; offsets are 64-bit,
because tars above 4 GiB exist. The column names and the meaning of the offsets are the public release's: an entry is
the member with a 512-byte header before its data. So an index written there is read here, and the other way round as
long as its offsets fit.
"""

import gzip
import logging
import os
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np

from dinov2.data.datasets.base import EncodedDataset, digest, make_extra
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.errors import DataError

__all__ = ["ImageNet22k"]

logger = logging.getLogger("dinov2")

_HEADER = 512
_GZIP_MAGIC = b"\x1f\x8b"
_UNREADABLE = frozenset({"n06470073_47249.JPEG"})  # broken in the published archive
_OFFSETS = ("class_index", "start_offset", "end_offset")


class ImageNet22k(EncodedDataset):
    """The images in all `root/*.tar`, classes in sorted order of the tars' names; the index from `extra` if dumped.

    `mmap_cache_size` is accepted for the release's sake and has no effect: no tar stays open.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None = None,
        transforms: Callable[[Any, Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        mmap_cache_size: int = 16,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform, transforms=transforms)
        self.root = os.path.abspath(root)
        self._extra = None if extra is None else os.path.abspath(extra)
        self._loaded: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The tars' names without extension, by class number."""
        return [str(class_id) for class_id in self._index()[1]]

    def __len__(self) -> int:
        return len(self._index()[0])

    def __getstate__(self) -> dict[str, Any]:
        from_files = self._loaded is not None and isinstance(self._loaded[0], np.memmap)
        return {**self.__dict__, "_loaded": None if from_files else self._loaded}

    def path_of(self, index: int) -> str:
        return f"{self._tar_of(index)}/{self._index()[0][index]['filename']}"

    def get_image_data(self, index: int) -> bytes:
        entry = self._index()[0][index]
        start, end = int(entry["start_offset"]) + _HEADER, int(entry["end_offset"])
        try:
            # Opened for each image: no descriptors to run out of, nothing to share by fork or to pickle.
            with open(self._tar_of(index), "rb") as tar:
                tar.seek(start)
                data = tar.read(end - start)
            if len(data) < end - start:
                raise DataError(f"{self.path_of(index)} is cut short; was the tar changed after its index was made?")
            return gzip.decompress(data) if data[:2] == _GZIP_MAGIC else data
        except (OSError, EOFError) as error:
            raise DataError(f"{self.path_of(index)} cannot be read ({error})") from error

    def get_target(self, index: int) -> int:
        return int(self._index()[0][index]["class_index"])

    def get_targets(self) -> np.ndarray:
        return self._index()[0]["class_index"].astype(np.int64)

    def get_class_id(self, index: int) -> str:
        """Class of image `index`, as its tar is called."""
        return self.find_class_id(self.get_target(index))

    def get_class_ids(self) -> np.ndarray:
        """Classes of all images, unicode `[S]`."""
        return self._index()[1][self.get_targets()]

    def find_class_id(self, class_index: int) -> str:
        """Name of a class number."""
        return str(self._index()[1][class_index])

    def fingerprint(self) -> str:
        entries, class_ids = self._index()
        return digest("ImageNet22k", "\n".join(map(str, class_ids)), *(entries[name] for name in _OFFSETS))

    def dump_extra(self) -> None:
        """Read the headers of all tars and write the index into `extra`. Raises DataError when that is no folder."""
        extra = make_extra(self._extra)
        entries, class_ids = self._read_tars()
        np.save(os.path.join(extra, "entries.npy"), entries)
        np.save(os.path.join(extra, "class-ids.npy"), class_ids)
        self._loaded = None

    def _tar_of(self, index: int) -> str:
        return os.path.join(self.root, f"{self.get_class_id(index)}.tar")

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Structured entries `[S]` and class names `[C]`."""
        if self._loaded is None:
            if self._extra is not None and os.path.isfile(os.path.join(self._extra, "entries.npy")):
                entries, class_ids = (
                    np.load(os.path.join(self._extra, name), mmap_mode="r", allow_pickle=False)
                    for name in ("entries.npy", "class-ids.npy")
                )
                self._loaded = entries, class_ids
            else:
                self._loaded = self._read_tars()
        return self._loaded

    def _read_tars(self) -> tuple[np.ndarray, np.ndarray]:
        if not os.path.isdir(self.root):
            raise DataError(f"the folder {self.root} does not exist; root is the folder that holds one tar a class")
        class_ids = sorted(name[: -len(".tar")] for name in os.listdir(self.root) if name.endswith(".tar"))
        rows: list[tuple[int, str, int, int, str]] = []
        for class_index, class_id in enumerate(class_ids):
            path = os.path.join(self.root, f"{class_id}.tar")
            try:
                with tarfile.open(path, "r:") as tar:
                    members = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and _is_image(m.name)]
            except (OSError, tarfile.TarError) as error:
                raise DataError(f"{path} cannot be read as a tar ({error}); replace or delete it") from error
            rows += [(class_index, class_id, at - _HEADER, at + size, name) for name, at, size in members]
        if not rows:
            raise DataError(f"no image was found in the {len(class_ids)} tars of {self.root}; root holds <class>.tar")
        width, name_width = max(map(len, class_ids)), max(len(row[4]) for row in rows)
        dtype = np.dtype(
            [
                ("class_index", "<u4"),
                ("class_id", f"U{width}"),
                ("start_offset", "<i8"),
                ("end_offset", "<i8"),
                ("filename", f"U{name_width}"),
            ]
        )
        return np.array(rows, dtype=dtype), np.array(class_ids)


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    return base not in _UNREADABLE and os.path.splitext(base)[1].lower() in IMAGE_EXTENSIONS
