"""What every data set here can do, and the three ways in which one holds its images.

`ImageDataset` is the contract; `PixelDataset` keeps decoded arrays, `EncodedDataset` keeps the bytes of image files
somewhere, `FileDataset` is the usual case of one file an image. A concrete set fills in the abstract methods and
overrides none of the others. All of them travel to worker processes of any start method.

An image that cannot be read raises a `DataError` that names it: which image takes its place is decided where batches
are made, not here.
"""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.decoding import Exif, decode_rgb, decode_tensor
from dinov2.data.image_files import read_image
from dinov2.errors import DataError

__all__ = ["EncodedDataset", "FileDataset", "ImageDataset", "PixelDataset", "digest", "make_extra", "read_bytes"]


class ImageDataset(Dataset[tuple[Any, Any]], ABC):
    """A sequence of `(image, target)`; the image is PIL RGB, the target an int or None, before the transforms.

    `transform` changes the image, `target_transform` the target, `transforms` both at once (as in torchvision; not
    together with the others). `class_names` lists the classes by label, or is None for a set without labels.
    """

    class_names: list[str] | None = None

    def __init__(
        self,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        transforms: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if transforms is not None and (transform is not None or target_transform is not None):
            raise DataError("a data set takes either transforms or transform and target_transform, and got both")
        self.transform = transform
        self.target_transform = target_transform
        self.transforms = transforms

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
        """Where the image comes from, for people: a path, or a name inside an archive or a generator."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest that changes when the images do; computed from names and sizes where that is possible."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = self._checked(index)
        image: Any = self.get_image(index)
        target: Any = self.get_target(index)
        if self.transforms is not None:
            image, target = self.transforms(image, target)
            return image, target
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _checked(self, index: int) -> int:
        # IndexError, not DataError: it ends `for image, target in dataset`.
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} was asked of a data set of {len(self)}")
        return int(index) % len(self)


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


def read_bytes(path: str) -> bytes:
    """The content of a file. Raises DataError naming it when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); was it moved or deleted?") from error


def make_extra(extra: str | None) -> str:
    """The folder for the metadata that `dump_extra` writes, made. Raises DataError when there is or can be none."""
    if extra is None:
        raise DataError("dump_extra has nowhere to write; give extra=FOLDER when the data set is made")
    try:
        os.makedirs(extra, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder extra={extra} cannot be made ({error.strerror}); give another one") from error
    return extra


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
