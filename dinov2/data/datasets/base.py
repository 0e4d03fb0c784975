"""The contract of a data set, three ways to hold images, and subsets.

`ImageDataset` is the contract; `PixelDataset` keeps decoded arrays, `EncodedDataset` the bytes of image files,
`FileDataset` is the usual case of one file an image. A concrete set fills in the abstract methods and overrides none of
the others. All of them travel to worker processes of any start method.

An image that cannot be read raises a `DataError` that names it: its substitute is chosen where batches are made.
"""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.decoding import Exif, decode_rgb, decode_tensor
from dinov2.data.image_files import read_image
from dinov2.errors import DataError

__all__ = [
    "EncodedDataset",
    "FileDataset",
    "ImageDataset",
    "PixelDataset",
    "Subset",
    "Transforms",
    "digest",
    "read_bytes",
]


class Transforms(TypedDict, total=False):
    """The keywords that every data set takes, each None or a function."""

    transform: Callable[[Any], Any] | None
    """Applied to the image."""
    target_transform: Callable[[Any], Any] | None
    """Applied to the target."""
    transforms: Callable[[Any, Any], Any] | None
    """Applied to image and target at once, as in torchvision; not together with the others."""


class ImageDataset(Dataset[tuple[Any, Any]], ABC):
    """A sequence of `(image, target)`; the image is PIL RGB, the target an int or None, before the `Transforms`."""

    class_names: list[str] | None = None
    """Names of the classes by label; None for a set without labels."""
    class_ids: list[str] | None = None
    """Identifiers of the classes by label, where the set has them."""

    def __init__(self, **transforms: Unpack[Transforms]) -> None:
        self.transform = transforms.get("transform")
        self.target_transform = transforms.get("target_transform")
        self.transforms = transforms.get("transforms")
        if self.transforms is not None and (self.transform is not None or self.target_transform is not None):
            raise DataError("a data set takes either transforms or transform and target_transform, and got both")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get_image_data(self, index: int) -> bytes:
        """The image as the bytes of a file in some image format. Raises DataError naming the path."""

    @abstractmethod
    def get_image(self, index: int) -> Image.Image:
        """The image as PIL RGB, without transform. Raises DataError naming the path."""

    @abstractmethod
    def get_tensor(self, index: int, *, channels: int = 3) -> Tensor:
        """The image as uint8 `[C, H, W]`, without transform. Raises DataError naming the path."""

    @abstractmethod
    def get_target(self, index: int) -> int | None:
        """The label, or None when the set has none."""

    @abstractmethod
    def get_targets(self) -> np.ndarray | None:
        """All labels, int64 `[S]`, or None when the set has none."""

    @abstractmethod
    def path_of(self, index: int) -> str:
        """Path of the image, or its name inside an archive or a generator."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the images do; computed from names and sizes where that is possible."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        # IndexError, not DataError: it ends `for image, target in dataset`.
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} was asked of a data set of {len(self)}")
        index = int(index) % len(self)
        image: Any = self.get_image(index)
        target: Any = self.get_target(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class PixelDataset(ImageDataset):
    """Images that exist as arrays: `get_pixels` is all that a subclass adds to the common contract."""

    @abstractmethod
    def get_pixels(self, index: int) -> np.ndarray:
        """uint8 `[H, W, 3]`."""

    def get_image_data(self, index: int) -> bytes:
        buffer = io.BytesIO()
        self.get_image(index).save(buffer, format="PNG")
        return buffer.getvalue()

    def get_image(self, index: int) -> Image.Image:
        return Image.fromarray(self.get_pixels(index))

    def get_tensor(self, index: int, *, channels: int = 3) -> Tensor:
        if channels != 3:
            return decode_tensor(self.get_image_data(index), channels, path=self.path_of(index))
        return torch.from_numpy(np.array(self.get_pixels(index).transpose(2, 0, 1), order="C"))


class EncodedDataset(ImageDataset):
    """Images that exist as encoded bytes, decoded on every access."""

    exif: ClassVar[Exif] = "ignore"

    def get_image(self, index: int) -> Image.Image:
        return decode_rgb(self.get_image_data(index), path=self.path_of(index), exif=self.exif)

    def get_tensor(self, index: int, *, channels: int = 3) -> Tensor:
        return decode_tensor(self.get_image_data(index), channels, path=self.path_of(index), exif=self.exif)


class FileDataset(EncodedDataset):
    """One file an image, found by `path_of`."""

    def get_image_data(self, index: int) -> bytes:
        return read_image(self.path_of(index))


class Subset(ImageDataset):
    """Images `rows` (int64 `[R]`) of `dataset`, in that order, with its classes and their numbers.

    The transforms of `dataset` are not applied; give those of the subset. Raises DataError when a row is outside.
    """

    def __init__(self, dataset: ImageDataset, rows: np.ndarray, **transforms: Unpack[Transforms]) -> None:
        super().__init__(**transforms)
        self.dataset = dataset
        self.rows = np.asarray(rows, dtype=np.int64)
        if not len(self.rows) or self.rows.min() < 0 or self.rows.max() >= len(dataset):
            raise DataError(f"a subset needs at least one image and numbers from 0 to {len(dataset) - 1}")
        self.class_names, self.class_ids = dataset.class_names, dataset.class_ids

    def __len__(self) -> int:
        return len(self.rows)

    def get_image_data(self, index: int) -> bytes:
        return self.dataset.get_image_data(int(self.rows[index]))

    def get_image(self, index: int) -> Image.Image:
        return self.dataset.get_image(int(self.rows[index]))

    def get_tensor(self, index: int, *, channels: int = 3) -> Tensor:
        return self.dataset.get_tensor(int(self.rows[index]), channels=channels)

    def get_target(self, index: int) -> int | None:
        return self.dataset.get_target(int(self.rows[index]))

    def get_targets(self) -> np.ndarray | None:
        targets = self.dataset.get_targets()
        return None if targets is None else targets[self.rows]

    def path_of(self, index: int) -> str:
        return self.dataset.path_of(int(self.rows[index]))

    def fingerprint(self) -> str:
        return digest("subset", self.dataset.fingerprint(), self.rows)


def read_bytes(path: str) -> bytes:
    """The content of a file. Raises DataError naming it when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); was it moved or deleted?") from error


def digest(*parts: str | bytes | np.ndarray) -> str:
    """SHA-256 of texts and arrays, each preceded by its length, so that parts cannot run into each other."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = part.encode("utf-8", "surrogatepass")  # names need not be valid Unicode
        data = part if isinstance(part, bytes) else part.tobytes()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()
