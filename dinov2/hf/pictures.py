"""Inputs of an image processor as tensors `[C, H, W]`: files, addresses, base64, PIL, arrays, tensors.

Files are opened as everywhere in this package: by decoders inside this process, within its limits, and upright.
Transparency is laid on white and greys are repeated, as the newest transformers does and older ones do not.
"""

import base64
import http.client
import os
import urllib.request
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dinov2.data.decoding import decode_rgb, to_rgb
from dinov2.data.image_files import get_image_options, read_image
from dinov2.errors import DataError

__all__ = ["ImageInput", "ResizeBackend", "list_pictures", "to_pixels"]

ResizeBackend = Literal["torchvision", "pil"]
"""Backend of resizing: torchvision on tensors, or PIL, whose pixels are those of the published evaluations."""

ImageInput = Image.Image | np.ndarray | Tensor
"""One image: PIL of any mode, or an array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`."""

_TIMEOUT = 30.0  # seconds without a byte of an address


def list_pictures(images: object) -> list[ImageInput]:
    """All images in one picture, batch `[B, ...]`, path or address, or in a (nested) list of them.

    Raises `DataError` for anything else, and for a file that cannot be read.
    """
    if isinstance(images, (list, tuple)):
        pictures = [picture for entry in images for picture in list_pictures(entry)]
        if not pictures:
            raise DataError("there are no images in an empty list; give at least one")
        return pictures
    if isinstance(images, (str, os.PathLike)):
        return [_open(os.fspath(images))]
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, (np.ndarray, Tensor)) and hasattr(images, "__array__"):  # of another framework
        images = np.asarray(images)
    if not isinstance(images, (np.ndarray, Tensor)) or images.ndim not in (2, 3, 4):
        shape = f" of shape {list(images.shape)}" if hasattr(images, "shape") else ""
        raise DataError(
            f"a {type(images).__name__}{shape} is no image; give PIL images, paths, or arrays and tensors [H, W], "
            "[H, W, C], [C, H, W] or with a batch in front"
        )
    if 0 in images.shape:
        raise DataError(f"an image of shape {list(images.shape)} is empty; give at least one pixel")
    return list(images) if images.ndim == 4 else [images]


def _open(text: str) -> Image.Image:
    short = text if len(text) <= 80 else f"{text[:77]}..."
    if text.startswith(("http://", "https://")):
        return decode_rgb(_fetch(text), path=text, exif="apply")
    if not text.startswith("data:") and len(text) < 4096 and os.path.exists(text):
        return decode_rgb(read_image(text), path=text, exif="apply")
    encoded = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:  # binascii's, and that of letters beyond ASCII
        raise DataError(f"{short!r} is neither an image file nor an address nor base64 text of one") from error
    return decode_rgb(data, path=short, exif="apply")


def _fetch(address: str) -> bytes:
    limit = get_image_options().max_bytes
    request = urllib.request.Request(address, headers={"User-Agent": "dinov2-anywhere"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            data: bytes = answer.read(limit + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"the image {address} cannot be fetched ({error}); check the address") from error
    if len(data) > limit:
        raise DataError(f"the image {address} has more than {limit:,} bytes; set DINOV2_MAX_IMAGE_BYTES to read it")
    return data


def to_pixels(
    picture: ImageInput, *, rgb: bool, backend: ResizeBackend, input_data_format: str | None = None
) -> Tensor:
    """The values of one picture, `[C, H, W]`; with `rgb`, greys are repeated and transparency is laid on white.

    Raises `DataError` when no axis of an array can be its channels.
    """
    if isinstance(picture, Image.Image):
        image = np.array(_pil_to_rgb(picture) if rgb else picture)
        image = image[..., None] if image.ndim == 2 else image
        return torch.from_numpy(image).permute(2, 0, 1)
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "buif":
            raise DataError(f"an array of {picture.dtype} is no image; give numbers")
        picture = torch.from_numpy(np.require(picture, requirements=["C", "W"]))  # torch warns of read-only memory
    pixels = picture.detach().cpu() if backend == "pil" else picture
    if pixels.dtype in (torch.uint16, torch.uint32):  # torch can hardly compute with them
        pixels = pixels.long()
    pixels = pixels[None] if pixels.ndim == 2 else _channels_first(pixels, input_data_format)
    return _tensor_to_rgb(pixels, backend) if rgb else pixels


def _pil_to_rgb(picture: Image.Image) -> Image.Image:
    # PIL cuts the 16-bit greys of scanners at 255, which leaves a white image; other integers and floats are taken to
    # be 0..255 already, as stock does.
    if picture.mode[0] in "IF" and not picture.mode.startswith("I;16"):
        return picture.convert("RGB")
    return to_rgb(picture)


def _channels_first(pixels: Tensor, input_data_format: str | None) -> Tensor:
    counts = (1, 3, 4)
    if input_data_format == "channels_last" or (
        input_data_format is None and pixels.shape[0] not in counts and pixels.shape[2] in counts
    ):
        return pixels.permute(2, 0, 1)
    if input_data_format is None and pixels.shape[0] not in counts:
        raise DataError(
            f"an image of shape {list(pixels.shape)} has no axis of 1, 3 or 4 channels; give [H, W, C] or [C, H, W], "
            "or say input_data_format"
        )
    return pixels


def _tensor_to_rgb(pixels: Tensor, backend: ResizeBackend) -> Tensor:  # [C, H, W] -> [3, H, W]
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1)
    if pixels.shape[0] != 4:
        return pixels
    if pixels.is_floating_point() and (pixels.min() < 0 or pixels.max() > 1):
        raise DataError(
            f"a transparent image of floats has values from {pixels.min():g} to {pixels.max():g}; they must be 0 to 1"
        )
    if backend == "torchvision":
        unit = tv.to_dtype(pixels, torch.float32, scale=True)
        return tv.to_dtype(unit[:3] * unit[3:] + (1 - unit[3:]), pixels.dtype, scale=True)
    white = 1.0 if pixels.is_floating_point() else 255.0
    alpha = pixels[3:].double() / white
    on_white = alpha * pixels[:3].double() + (1 - alpha) * white
    return (on_white if pixels.is_floating_point() else on_white.round()).to(pixels.dtype)
