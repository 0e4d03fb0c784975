"""The multi-crop augmentation for a whole batch of uint8 images at once, on CPU or GPU.

Same distribution and same 8-bit arithmetic as `augment_image`, several times faster on small images: parameters are
drawn for all crops at once, colour and blur work on the crops that drew them, and crop, resize and flip are matrix
products with Pillow's bicubic kernel. Bicubic resampling is linear and separable, so a crop is `R_y @ image @ R_x^T`
with one small matrix per axis and crop; the box and the flip are folded into the matrices. Values are rounded and
clipped to 8 bits after each axis, as Pillow does. On a CPU dense matrices pay for small images; large ones go through
torch's resize, one crop at a time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.data.crops.color_augment import apply_color_and_blur
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.parameters import CropParameters, draw_crop_parameters
from dinov2.errors import DataError

__all__ = ["augment_batch", "crop_and_resize"]

_LARGEST_DENSE_SIDE = 96


def augment_batch(
    images: Tensor | Sequence[Tensor],  # uint8 [B, C, H, W], or B times [C, H, W] of any sizes
    sample_numbers: NDArray[np.int64],  # [B]
    config: AugmentationConfig,
    *,
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """Normalised crops, crop-major: global [2*B, C, S, S] and local [L*B, C, s, s], None without local crops.

    The crops of an image are a function of `seed` and its sample number. Images may have any number of channels;
    saturation, hue, grayscale and solarise need three and are left out otherwise.
    """
    if len(images) == 0 or len(images) != len(sample_numbers):
        raise DataError(f"got {len(images)} images and {len(sample_numbers)} sample numbers; one for each is needed")
    sizes = [images.shape[2:]] if isinstance(images, Tensor) else [image.shape[1:] for image in images]
    heights, widths = np.broadcast_to(np.array(sizes), (len(images), 2)).T
    parameters = draw_crop_parameters(config, seed=seed, sample_numbers=sample_numbers, heights=heights, widths=widths)
    n_crops = 2 + config.local_crops_number
    global_crops = _make_crops(images, parameters.crops(0, 2), config.global_crops_size, config)
    if n_crops == 2:
        return global_crops, None
    return global_crops, _make_crops(images, parameters.crops(2, n_crops), config.local_crops_size, config)


def _make_crops(
    images: Tensor | Sequence[Tensor], parameters: CropParameters, size: int, config: AugmentationConfig
) -> Tensor:
    boxes = np.stack([parameters.top, parameters.left, parameters.height, parameters.width], axis=-1)
    crops = crop_and_resize(images, torch.from_numpy(boxes), torch.from_numpy(parameters.flip), size)
    crops = apply_color_and_blur(crops, parameters)
    std = torch.tensor(config.std, device=crops.device).view(-1, 1, 1)
    mean = torch.tensor(config.mean, device=crops.device).view(-1, 1, 1)
    return crops.mul_(1 / (255 * std)).sub_(mean / std)


def crop_and_resize(
    images: Tensor | Sequence[Tensor],  # uint8 [B, C, H, W], or B times [C, H, W]
    boxes: Tensor,  # [K*B, 4] top, left, height, width; on the CPU
    flips: Tensor,  # [K*B] bool; on the CPU
    size: int,
) -> Tensor:  # [K*B, C, size, size]
    """Cut K boxes out of each image and resize them to `size`: float32 with whole values from 0 to 255, crop-major."""
    if isinstance(images, Tensor) and (images.device.type != "cpu" or max(images.shape[2:]) <= _LARGEST_DENSE_SIDE):
        return _crop_by_matrices(images, boxes, flips, size)
    crops = [_crop_one(images[row % len(images)], box, size) for row, box in enumerate(boxes.tolist())]
    stacked = torch.stack(crops)
    flips = flips.to(stacked.device)[:, None, None, None]
    return torch.where(flips, stacked.flip(-1), stacked)


def _bicubic_matrices(
    starts: Tensor,  # [...] first pixel of the box
    lengths: Tensor,  # [...] its number of pixels
    in_size: int,
    out_size: int,
    flips: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., out_size, in_size]
    """Matrices that resample the given stretches of `in_size` pixels to `out_size` ones, reversed where `flips`.

    Cubic convolution with a = -0.5, widened when it reduces (antialias); nothing outside the stretch is looked at.
    """
    starts, lengths = starts.float()[..., None, None], lengths.float()[..., None, None]
    device = starts.device
    places = torch.arange(out_size, device=device, dtype=torch.float32)[:, None].expand(*starts.shape[:-2], -1, 1)
    if flips is not None:
        places = torch.where(flips[..., None, None], out_size - 1 - places, places)
    scales = lengths / out_size
    pixels = torch.arange(in_size, device=device, dtype=torch.float32)
    centres = starts + (places + 0.5) * scales - 0.5  # [..., out, 1]
    distances = (pixels - centres).mul_(1 / scales.clamp(min=1)).abs_()  # [..., out, in]
    # The two cubic pieces of the kernel as truncated powers, which needs no branch.
    outer = (2 - distances).clamp_(min=0)
    inner = (1 - distances).clamp_(min=0)
    weights = (outer - 1).mul_(outer).mul_(outer).mul_(0.5)
    weights += inner.square().mul_(1 - 2 * inner)
    weights *= (pixels >= starts) & (pixels < starts + lengths)
    return weights / weights.sum(dim=-1, keepdim=True)


def _crop_by_matrices(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    n_images, channels, height, width = images.shape
    boxes = boxes.to(images.device, non_blocking=True)
    top, left, box_height, box_width = boxes.view(-1, n_images, 4).permute(2, 1, 0)  # [B, K] each
    flips = flips.to(images.device, non_blocking=True).view(-1, n_images).T
    over_x = _bicubic_matrices(left, box_width, width, size, flips).flatten(1, 2)  # [B, K*size, W]
    over_y = _bicubic_matrices(top, box_height, height, size).flatten(0, 1)  # [B*K, size, H]
    columns = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    columns = columns.flatten(2)  # [B, W, C*H]
    rows = _as_bytes(over_x @ columns)  # [B, K*size, C*H]
    rows = rows.view(over_y.shape[0], size * channels, height)  # [B*K, size*C, H], x before channel
    crops = _as_bytes(rows @ over_y.mT)  # [B*K, size*C, size]
    crops = crops.view(n_images, -1, size, channels, size)  # [B, K, x, C, y]
    return crops.permute(1, 0, 3, 4, 2).reshape(-1, channels, size, size)


def _crop_one(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if image.device.type != "cpu":  # torch resizes bytes on the CPU only
        crop = crop.float()
    resized = interpolate(crop, (size, size), mode="bicubic", antialias=True)
    return _as_bytes(resized.float())[0]


def _as_bytes(values: Tensor) -> Tensor:
    """Round (halves up, like Pillow) and clip to what 8 bits can hold, in place."""
    return values.clamp_(0, 255).add_(0.5).floor_()
