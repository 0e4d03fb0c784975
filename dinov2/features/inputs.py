"""Whatever people call an image, as the tensors that a model takes.

Pixels (paths, PIL images, uint8 arrays and tensors) go through the model's transform. Floating-point tensors and arrays
are taken as what a transform has already made, normalised `[C, H, W]`; only their sides are filled up to a multiple of
the patch.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.decoding import decode_rgb, decode_tensor, to_rgb
from dinov2.data.eval_transform import pad_to_multiple
from dinov2.errors import DataError

__all__ = ["as_list", "to_model_input"]


def as_list(images: Any) -> tuple[list[Any], bool]:
    """The images one by one, and whether there was only one: a picture, a path, a `[C, H, W]` or `[H, W, C]`."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images], True
    if isinstance(images, (Tensor, np.ndarray)):
        if images.ndim == 4:
            return list(images), False
        return [images], True
    if isinstance(images, Sequence):
        return list(images), False
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
        return transform(_read(Path(image).expanduser(), channels))
    if isinstance(image, Image.Image):
        return transform(to_rgb(image) if channels == 3 else image)
    if isinstance(image, np.ndarray):
        image = _from_array(image, channels)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        got = f"of shape {list(image.shape)}" if isinstance(image, Tensor) else f"of type {type(image).__name__}"
        raise DataError(f"an image {got} was given; give a path, a PIL image, or a tensor [C, H, W]")
    image = image[None] if image.ndim == 2 else image
    if image.shape[0] == 1 and channels == 3:  # grey
        image = image.expand(3, -1, -1)
    if image.shape[0] != channels or min(image.shape[1:]) < 1:
        raise DataError(
            f"an image tensor of shape {list(image.shape)} was given to a model that takes [{channels}, H, W]"
            + ("; move the channels to the front" if image.shape[-1] == channels else "")
        )
    if image.dtype == torch.uint8:
        return transform(image)
    if not image.is_floating_point():
        raise DataError(f"an image tensor of {image.dtype} was given; use uint8 for pixels, float32 once normalised")
    return pad_to_multiple(image.float(), patch_size)


def _read(path: Path, channels: int) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the image {path} cannot be read ({error.strerror}); check the path") from error
    if channels == 3:
        return decode_rgb(data, path=str(path), exif="apply")
    return decode_tensor(data, channels, path=str(path), exif="apply")


def _from_array(image: np.ndarray[Any, Any], channels: int) -> Tensor:
    """Pixels are usually `[H, W, C]`, tensors `[C, H, W]`; of two possible readings the usual one for uint8 wins."""
    tensor = torch.from_numpy(np.array(image, order="C"))
    if tensor.dtype == torch.uint8 and tensor.ndim == 3 and tensor.shape[-1] in (1, channels):
        return tensor.permute(2, 0, 1).contiguous()
    return tensor
