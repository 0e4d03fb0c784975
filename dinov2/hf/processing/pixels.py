"""The pixels of an image processor: what users hand in becomes tensors, which are resized, cropped and normalised.

Two backends differ in three places, and each follows transformers' to the bit: who resizes (torchvision on tensors, or
PIL on 8-bit pictures, which is what the published evaluations did), where the odd row goes when a small image is
padded to the crop, and how scaling and normalisation round.
"""

import base64
import http.client
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinov2.data.decoding import decode_rgb, to_rgb
from dinov2.data.image_files import get_image_options, read_image
from dinov2.errors import ConfigError, DataError
from dinov2.hf.processing.settings import Backend, Size

__all__ = [
    "Picture",
    "center_crop",
    "list_pictures",
    "pad",
    "pixels_of",
    "rescale_and_normalize",
    "resize",
    "resized_size",
]

Picture = Image.Image | np.ndarray | Tensor
"""One image: PIL of any mode, or an array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`."""

_TIMEOUT = 30.0  # seconds without a byte of an address

_MODES = {
    Resampling.NEAREST: InterpolationMode.NEAREST_EXACT,  # the one that PIL's nearest is
    Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Resampling.LANCZOS: InterpolationMode.LANCZOS,
}


def list_pictures(images: Any) -> list[Picture]:
    """All images in what a user hands in: one or a (nested) list of pictures, batches `[B, ...]`, paths and addresses.

    Raises `DataError` for anything else, and for a file that cannot be read.
    """
    if isinstance(images, (list, tuple)):
        pictures = [picture for entry in images for picture in list_pictures(entry)]
        if not pictures:
            raise DataError("there are no images in an empty list; give at least one")
        return pictures
    if isinstance(images, (str, os.PathLike)):
        return [_opened(images)]
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


def _opened(source: str | os.PathLike[str]) -> Image.Image:
    text = os.fspath(source)
    short = text if len(text) <= 80 else f"{text[:77]}..."
    if text.startswith(("http://", "https://")):
        return decode_rgb(_fetched(text), path=text, exif="apply")
    if not text.startswith("data:") and len(text) < 4096 and os.path.exists(text):
        return decode_rgb(read_image(text), path=text, exif="apply")
    encoded = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:  # binascii's, and that of letters beyond ASCII
        raise DataError(f"{short!r} is neither an image file nor an address nor base64 text of one") from error
    return decode_rgb(data, path=short, exif="apply")


def _fetched(address: str) -> bytes:
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


def pixels_of(picture: Picture, *, rgb: bool, backend: Backend, input_data_format: str | None) -> Tensor:  # [C, H, W]
    """The values of one picture; with `rgb`, greys are repeated and transparency is laid on white.

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


def _tensor_to_rgb(pixels: Tensor, backend: Backend) -> Tensor:  # [C, H, W] -> [3, H, W]
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


def resized_size(height: int, width: int, size: Size) -> tuple[int, int]:
    """Height and width after the resize to `size`; the longer side is rounded down."""
    short, long = min(height, width), max(height, width)
    if size.height and size.width:
        return size.height, size.width
    if size.max_height and size.max_width:
        scale = min(size.max_height / height, size.max_width / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    new_short = size.shortest_edge or 0
    new_long = int(new_short * long / short)
    if size.longest_edge and long / short * new_short > size.longest_edge:
        exact = size.longest_edge * short / long
        new_short, new_long = max(1, round(exact)), int(exact * long / short)
    if size.longest_edge and new_short == short:
        return height, width
    return (new_short, new_long) if height <= width else (new_long, new_short)


def resize(pixels: Tensor, size: Size, resample: Resampling, backend: Backend) -> Tensor:  # [C, H, W] -> [C, h, w]
    """The image at another size, with antialias; of the same dtype, except that PIL gives uint8 for whole numbers.

    torchvision has no box and Hamming filters, and before 0.27 no Lanczos on tensors; PIL computes them in its place.
    Raises `DataError` for values that PIL cannot hold.
    """
    height, width = resized_size(pixels.shape[-2], pixels.shape[-1], size)
    on_tensor = resample in _MODES and (resample != Resampling.LANCZOS or _torchvision_has_lanczos(pixels))
    if backend == "torchvision" and on_tensor:
        resized: Tensor = tv.resize(pixels, [height, width], interpolation=_MODES[resample], antialias=True)
        return resized
    eight_bits, is_unit = _eight_bits(pixels.cpu())
    channels = np.ascontiguousarray(eight_bits.permute(1, 2, 0).numpy())
    picture = Image.fromarray(channels[..., 0] if channels.shape[2] == 1 else channels)
    array = np.array(picture.resize((width, height), resample=resample))
    result = torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)
    return ((result.double() * (1 / 255)).float() if is_unit else result).to(pixels.device)


def _torchvision_has_lanczos(pixels: Tensor) -> bool:
    version = tuple(int(part) for part in torchvision.__version__.split(".")[:2])
    return version >= (0, 27) and pixels.device.type == "cpu"


def _eight_bits(pixels: Tensor) -> tuple[Tensor, bool]:
    """uint8 for PIL, and whether the values were fractions of one."""
    if pixels.dtype == torch.uint8:
        return pixels, False
    values = pixels.double()
    whole = bool(torch.isclose(values, values.trunc()).all())
    low, high = values.min().item(), values.max().item()
    if low < 0 or high > (255 if whole else 1):
        raise DataError(
            f"PIL resizes values 0 to 255, or fractions 0 to 1, and these are {low:g} to {high:g}; "
            'give such images with do_resize=False or backend="torchvision"'
        )
    return (values if whole else (values * 255).float()).to(torch.uint8), not whole


def center_crop(pixels: Tensor, size: Size, backend: Backend) -> Tensor:  # [C, H, W] -> [C, h, w]
    """The middle of an image, the odd pixel left at the bottom and right; a smaller image is padded with zeros."""
    height, width = size["height"], size["width"]
    short_by = [max(0, height - pixels.shape[-2]), max(0, width - pixels.shape[-1])]
    if any(short_by):
        top, left = (missing // 2 if backend == "torchvision" else (missing + 1) // 2 for missing in short_by)
        pixels = F.pad(pixels, (left, short_by[1] - left, top, short_by[0] - top))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def rescale_and_normalize(  # [..., C, H, W]
    pixels: Tensor,
    *,
    factor: float | None,
    statistics: tuple[float | Sequence[float], float | Sequence[float]] | None,
    backend: Backend,
) -> Tensor:
    """`(pixels * factor - mean) / std` in float32; what is None is left out, and without both nothing changes.

    Raises `ConfigError` when the number of statistics is not that of the channels.
    """
    if statistics is None:
        if factor is None:
            return pixels
        return (pixels.double() * factor).float() if backend == "pil" else pixels * factor
    mean, std = (_per_channel(values, pixels) for values in statistics)
    if factor is not None and backend == "pil":
        pixels = (pixels.double() * factor).float()
    elif factor is not None:  # one pass over the pixels less
        mean, std = mean * (1.0 / factor), std * (1.0 / factor)
    return (pixels.float() - mean).div_(std)


def _per_channel(values: float | Sequence[float], pixels: Tensor) -> Tensor:
    column = torch.tensor(values, dtype=torch.float32, device=pixels.device).reshape(-1, 1, 1)
    if column.shape[0] not in (1, pixels.shape[-3]):
        raise ConfigError(
            f"image_mean and image_std hold {column.shape[0]} values for an image of {pixels.shape[-3]} channels; "
            "give one for each, or leave do_convert_rgb on"
        )
    return column


def pad(images: Sequence[Tensor], size: Size | None) -> list[Tensor]:  # of [C, H, W]
    """The images with zeros at the bottom and right, up to `size` or to the largest of them.

    Raises `ConfigError` for an image larger than `size`.
    """
    heights, widths = zip(*(image.shape[-2:] for image in images), strict=True)
    height, width = (size["height"], size["width"]) if size else (max(heights), max(widths))
    if max(heights) > height or max(widths) > width:
        raise ConfigError(f"images of up to {max(heights)}x{max(widths)} do not fit pad_size {height}x{width}")
    return [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
