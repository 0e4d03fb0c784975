"""CIFAR-10 from the archives of its authors: nothing is downloaded, and nothing in a pickle is executed.

Found in the folder given (or given itself): `cifar-10-batches-py/`, `cifar-10-python.tar.gz`, `cifar-10-batches-bin/`,
`cifar-10-binary.tar.gz`. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import os
import pickle
import tarfile
from typing import Literal, Unpack

import numpy as np

from dinov2.data.datasets.base import PixelDataset, Transforms, digest, read_bytes
from dinov2.errors import DataError

__all__ = ["Cifar10"]

_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_BATCHES = {"TRAIN": [f"data_batch_{number}" for number in range(1, 6)], "VAL": ["test_batch"]}
_ROW = 3 * 32 * 32


class Cifar10(PixelDataset):
    """The 50,000 training (`TRAIN`) or 10,000 test images (`VAL`), 32 x 32, in the order of the batch files."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: Literal["TRAIN", "VAL"] = "TRAIN",
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(**transforms)
        if split not in _BATCHES:
            raise DataError(f"CIFAR-10 has no split {split!r}; write TRAIN or VAL (its test batch)")
        self.root = os.path.abspath(root)
        self.split = split
        self.class_names = list(_CLASSES)
        self._loaded: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._images()[1])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_loaded": None}  # 150 MB that a worker reads again faster than it unpickles them

    def get_pixels(self, index: int) -> np.ndarray:
        return self._images()[0][index]

    def get_target(self, index: int) -> int:
        return int(self._images()[1][index])

    def get_targets(self) -> np.ndarray:
        return self._images()[1]

    def path_of(self, index: int) -> str:
        return f"{self.root}:{self.split}/{index}"

    def fingerprint(self) -> str:
        return digest("cifar10", self.split, *self._images())

    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 `[S, 32, 32, 3]` and labels int64 `[S]`."""
        if self._loaded is None:
            parts = [_read_batch(name, data) for name, data in _find_batches(self.root, _BATCHES[self.split])]
            pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
            labels = np.concatenate([labels for _, labels in parts])
            self._loaded = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels
        return self._loaded


def _find_batches(root: str, names: list[str]) -> list[tuple[str, bytes]]:
    """`(name for messages, content)` of the batch files."""
    if os.path.isfile(root):
        return _from_archive(root, names)
    for folder in (root, *(os.path.join(root, name) for name in _FOLDERS)):
        for extension in ("", ".bin"):
            files = [os.path.join(folder, name + extension) for name in names]
            if os.path.isfile(files[0]):
                return [(file, read_bytes(file)) for file in files]
    for name in _ARCHIVES:
        if os.path.isfile(os.path.join(root, name)):
            return _from_archive(os.path.join(root, name), names)
    raise DataError(
        f"no CIFAR-10 was found in {root}; expected {', '.join((*_FOLDERS, *_ARCHIVES))} there "
        f"(for a folder of images write folder:PATH)"
    )


def _from_archive(path: str, names: list[str]) -> list[tuple[str, bytes]]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = os.path.basename(member.name).removesuffix(".bin")
                content = tar.extractfile(member) if name in names else None
                if content is not None:
                    contents[name] = content.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"the archive {path} cannot be read ({error}); fetch it again") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise DataError(f"the archive {path} holds no {missing[0]}; is it CIFAR-10's?")
    return [(f"{path}:{name}", contents[name]) for name in names]


def _read_batch(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 `[n, 3072]` (red, green, blue planes) and labels int64 `[n]`."""
    if len(data) % (_ROW + 1) == 0 and data[:1] != b"\x80":  # 0x80 opens a pickle; a binary row opens with its label
        rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, _ROW + 1)
        pixels, labels = rows[:, 1:], rows[:, 0].astype(np.int64)
    else:
        try:
            batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
            pixels = np.asarray(batch[b"data"] if b"data" in batch else batch["data"])
            labels = np.asarray(batch[b"labels"] if b"labels" in batch else batch["labels"], dtype=np.int64)
        except DataError as error:
            raise DataError(f"{name} is no CIFAR-10 batch: {error}") from error
        except Exception as error:
            raise DataError(f"{name} is no CIFAR-10 batch ({type(error).__name__}: {error}); fetch it again") from error
    right_shape = pixels.dtype == np.uint8 and pixels.shape == (len(labels), _ROW)
    if not right_shape or not len(labels) or labels.min() < 0 or labels.max() >= len(_CLASSES):
        raise DataError(
            f"{name} is no CIFAR-10 batch: {pixels.dtype} data of shape {list(pixels.shape)}; fetch it again"
        )
    return pixels, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numbers, texts, lists, dictionaries and numpy arrays; any other object is refused by name."""

    def find_class(self, module: str, name: str) -> object:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "numpy.core.multiarray", "_reconstruct":
                return _reconstruct
            case "_codecs", "encode":
                return _encode
        raise DataError(f"it asks for {module}.{name}, which no array needs; do not trust this file")


def _reconstruct(kind: type[np.ndarray], shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    """The empty array that the pickle then fills."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _encode(text: str, encoding: str) -> bytes:
    """Form in which Python 3 writes bytes into old pickles."""
    return text.encode("latin1")
