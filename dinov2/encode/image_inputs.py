"""Accepted image inputs, as the tensors that a model takes.

Pixels (paths, PIL images, uint8 arrays and tensors) go through the model's transform; files and PIL images are turned
upright by their EXIF orientation. Floating-point tensors and arrays are taken as what a transform has already made,
normalised `[C, H, W]`; only their sides are filled up to a multiple of the patch. Floats that look like pixels instead
are refused (0 to more than 8) or warned of (all within 0..1).

`find_frames` lists the pictures that paths, folders and patterns name, each frame of a moving picture by itself.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.files import find_image_files
from dinov2.data.decoding import count_frames, decode_rgb, decode_tensor, pil_with_channels
from dinov2.data.eval_transform import pad_to_multiple
from dinov2.data.image_files import read_image
from dinov2.encode.stream import read_ahead
from dinov2.errors import DataError

__all__ = ["Frame", "as_list", "find_frames", "open_frame", "open_frames", "to_model_input"]

_FROM_BYTES = "PIL.Image.open(io.BytesIO(data)) of its bytes"
_MAY_MOVE = frozenset(".apng .gif .png .tif .tiff .webp".split())
_LARGEST_NORMALISED = 8.0  # above what any usual mean and standard deviation make of a pixel


def as_list(images: Any) -> tuple[list[Any], bool]:
    """The images one by one, and whether there was only one: a picture, a path, a `[C, H, W]` or `[H, W, C]`."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images], True
    if isinstance(images, (Tensor, np.ndarray)):
        if images.ndim == 4:
            return list(images), False
        return [images], True
    if isinstance(images, Sequence) and not isinstance(images, (bytes, bytearray, memoryview)):
        return list(images), False
    if isinstance(images, (bytes, bytearray, memoryview)) or hasattr(images, "read"):
        raise DataError(f"a {type(images).__name__} was given as an image; give its path, or {_FROM_BYTES}")
    raise DataError(
        f"a {type(images).__name__} is no image; give a path, a PIL image, an array, a tensor, or a list of them"
    )


def to_model_input(
    image: Any,
    transform: Callable[[Any], Tensor],
    *,
    patch_size: int,
    channels: int = 3,
) -> Tensor:  # [channels, h * patch_size, w * patch_size], float32, normalised
    """One image of any kind, ready for a model with that number of input channels.

    Raises `DataError` for what is no image, and for a number of channels that the model does not take.
    """
    if isinstance(image, (str, os.PathLike)):
        return transform(_read(image, channels))
    if isinstance(image, Image.Image):
        return transform(pil_with_channels(image, channels))
    if isinstance(image, np.ndarray):
        image = _from_array(image, channels)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        got = f"of shape {list(image.shape)}" if isinstance(image, Tensor) else f"of type {type(image).__name__}"
        ways = f"a path, {_FROM_BYTES}," if isinstance(image, (bytes, bytearray)) else "a path, a PIL image,"
        raise DataError(f"an image {got} was given; give {ways} or a tensor [C, H, W]")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise DataError(f"an image tensor of {image.dtype} was given; use uint8 for pixels, float32 once normalised")
    if image.is_floating_point():
        _check_normalised(image)
    image = image[None] if image.ndim == 2 else image
    if image.shape[0] == 1 and channels == 3:  # grey
        image = image.expand(3, -1, -1)
    if image.shape[0] != channels or min(image.shape[1:]) < 1:
        raise DataError(
            f"an image tensor of shape {list(image.shape)} was given to a model that takes [{channels}, H, W]"
            + ("; move the channels to the front" if image.shape[-1] == channels else "")
        )
    return transform(image) if image.dtype == torch.uint8 else pad_to_multiple(image.float(), patch_size)


def _check_normalised(image: Tensor) -> None:
    """Raises `DataError` for floats that are pixels of 0..255, and warns of those that may be pixels of 0..1."""
    low, high = (float(end) for end in image.detach().aminmax()) if image.numel() else (0.0, 0.0)
    if not low >= 0 or low == high:
        return
    sentence = f"an image of {image.dtype} from {low:.4g} to {high:.4g} was given, and floats are taken as normalised"
    advice = "give pixels as uint8 (0 to 255), a PIL image or a path, or normalise them: (x - mean) / std"
    if high > _LARGEST_NORMALISED:
        raise DataError(f"{sentence}; {advice}")
    if high <= 1:
        warnings.warn(f"{sentence} already, not as pixels of 0..1; {advice}", UserWarning, stacklevel=4)


def _read(path: str | os.PathLike[str], channels: int) -> Any:
    if isinstance(path, str) and "://" in path:
        raise DataError(f"the image {path} is an address, and images are not downloaded; give the path of its file")
    file = Path(path).expanduser()
    data = read_image(file)
    if channels == 3:
        return decode_rgb(data, path=str(file), exif="apply")
    return decode_tensor(data, channels, path=str(file), exif="apply")


def _from_array(image: np.ndarray[Any, Any], channels: int) -> Tensor:
    """Pixels are usually `[H, W, C]`, tensors `[C, H, W]`; of two possible readings the usual one for uint8 wins."""
    tensor = torch.from_numpy(np.array(image, order="C"))
    if tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[-1] in (1, channels):
        return tensor.permute(2, 0, 1).contiguous()
    return tensor


@dataclass(frozen=True)
class Frame:
    """A picture in a file; `number` counts from 0 in files of several, and is None in others."""

    path: Path
    number: int | None = None

    @property
    def name(self) -> str:
        """The file's name, with the number of the frame if it has one."""
        return self.path.name if self.number is None else f"{self.path.name} {self.number}"


def find_frames(images: Sequence[str | os.PathLike[str]]) -> list[Frame]:
    """All pictures that `images` name: files, folders with everything below, patterns such as `photos/*.jpg`.

    Those of a folder or pattern come in the order people count, in which `frame_10.png` comes after `frame_9.png`.
    Files of several frames (GIF, WebP, TIFF) give each of them. Raises `DataError` for a path that does not exist, a
    pattern without matches, and a folder without images.
    """
    if not images:
        raise DataError("no image was named; give files or a folder")
    paths = (path for source in images for path in sorted(map(Path, find_image_files(source)), key=_as_counted))
    return [frame for path in paths for frame in _frames_of(path)]


def open_frame(frame: Frame) -> Image.Image:
    """The picture as RGB, upright. Raises `DataError` when it cannot be read."""
    return decode_rgb(read_image(frame.path), path=str(frame.path), exif="apply", frame=frame.number or 0)


def open_frames(frames: Iterable[Frame]) -> Iterator[Image.Image | DataError]:
    """The pictures, decoded ahead of use; in the place of one that cannot be read, the error."""

    def read(frame: Frame) -> Image.Image | DataError:
        try:
            return open_frame(frame)
        except DataError as error:
            return error

    return read_ahead(read, frames)


def _frames_of(path: Path) -> list[Frame]:
    if path.suffix.lower() not in _MAY_MOVE:
        return [Frame(path)]
    try:
        n_frames = count_frames(read_image(path), path=str(path))
    except DataError:  # raised again when it is opened
        return [Frame(path)]
    return [Frame(path)] if n_frames == 1 else [Frame(path, number) for number in range(n_frames)]


def _as_counted(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.as_posix().lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
