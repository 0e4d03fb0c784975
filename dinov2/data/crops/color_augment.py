"""Colour and blur for a batch of crops, each with its own parameters, in the 8-bit arithmetic of Pillow.

Crops are float32 tensors that hold whole numbers from 0 to 255; every operation ends in whole numbers again, truncated
or rounded as Pillow does it, because the statistics that a model learns on depend on it (truncation darkens by half a
unit each time). An operation is computed for the crops that drew it and for no others. The parameters are on the CPU,
so that choosing those crops never waits for a device.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dinov2.data.crops.parameters import CONTRAST, HUE, SATURATION, CropParameters

__all__ = ["apply_color_and_blur"]

_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2 in units of 2^-16, as Pillow has them
_BLUR_RADIUS = 4
_SOLARIZE_THRESHOLD = 128

_Rows = NDArray[np.int64]


def apply_color_and_blur(crops: Tensor, parameters: CropParameters) -> Tensor:
    """Jitter, grayscale, blur and solarise `crops` [n, C, size, size] in place, each with its own parameters [n].

    Saturation, hue, grayscale and solarise apply to crops of three channels only.
    """
    has_color = crops.shape[1] == 3
    _change(crops, _rows_to_jitter(parameters), parameters, _jitter)
    if has_color:
        _change(crops, np.flatnonzero(parameters.grayscale), parameters, _grayscale)
    _change(crops, np.flatnonzero(parameters.blur), parameters, _blur)
    if has_color:
        _change(crops, np.flatnonzero(parameters.solarize), parameters, _solarize)
    return crops


def _change(
    crops: Tensor, rows: _Rows, parameters: CropParameters, operation: Callable[[Tensor, CropParameters, _Rows], Tensor]
) -> None:
    """Replace the chosen rows by what `operation` makes of them."""
    if rows.size:
        places = torch.from_numpy(rows).to(crops.device, non_blocking=True)
        crops.index_copy_(0, places, operation(crops.index_select(0, places), parameters, rows))


def _rows_to_jitter(parameters: CropParameters) -> _Rows:
    """The jittered crops, those with the hue at the same place of the order next to each other."""
    rows = np.flatnonzero(parameters.jitter)
    return rows[np.argsort(_place_of_hue(parameters, rows), kind="stable")]


def _place_of_hue(parameters: CropParameters, rows: _Rows) -> NDArray[np.int64]:
    return (parameters.order[rows] == HUE).argmax(axis=1)


def _jitter(crops: Tensor, parameters: CropParameters, rows: _Rows) -> Tensor:
    """Apply the four operations of each crop in its own order.

    Brightness, contrast and saturation are one formula, a blend with black, with the mean or with the gray picture; so
    only the hue needs groups of its own, which lie side by side.
    """
    order = parameters.order[rows]  # [n, place]
    factors = np.take_along_axis(parameters.factors[rows], order, axis=1)
    shifts = _on_device((factors * 255).astype(np.int64), crops)  # truncated, in 1/256 turns
    blends = np.stack([factors, order == CONTRAST, order == SATURATION], axis=-1)  # [n, place, 3]
    bounds = np.searchsorted(_place_of_hue(parameters, rows), np.arange(5)).tolist()
    has_color = crops.shape[1] == 3
    blends[order == HUE, 0] = 1.0
    if not has_color:
        blends[order == SATURATION, 0] = 1.0
    blend_table = _on_device(blends, crops)
    for place in range(4):
        begin, end = bounds[place], bounds[place + 1]
        if has_color and begin < end:
            crops[begin:end] = _shift_hue(crops[begin:end], shifts[begin:end, place])
        for first, last in ((0, begin), (end, len(crops))):
            if first < last:
                _blend(crops[first:last], blend_table[first:last, place])
    return crops


def _blend(crops: Tensor, table: Tensor) -> None:
    """Brightness, contrast or saturation in place; `table` [n, 3]: factor, is it contrast, is it saturation."""
    factor, is_contrast, is_saturation = table[:, :, None, None, None].unbind(1)  # [n, 1, 1, 1]
    gray = _gray(crops)  # [n, 1, H, W]
    mean = gray.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_()
    towards = gray.mul_(is_saturation).add_(mean.mul_(is_contrast))
    crops.sub_(towards).mul_(factor).add_(towards).clamp_(0, 255).floor_()


def _gray(crops: Tensor) -> Tensor:
    """[n, C, H, W] to [n, 1, H, W]: luma for three channels, else their mean."""
    if crops.shape[1] != 3:
        return crops.mean(dim=1, keepdim=True).round_()
    red, green, blue = crops.split(1, dim=1)
    gray = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return gray.add_(32768.0).mul_(2.0**-16).floor_()


def _shift_hue(crops: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue of [n, 3, H, W] by `shifts` [n] / 256 turns, through Pillow's 8-bit HSV."""
    hue, saturation, value = _to_hsv(crops)
    hue = hue.add_(shifts[:, None, None])
    sextants = hue.sub_((hue / 256).floor_().mul_(256)).mul_(6 / 255)  # [n, H, W] in [0, 6]
    colourful = saturation.mul_(value).mul_(1 / 255)
    black = value - colourful + 0.5  # what the weakest channel keeps; the half rounds
    red = (sextants - 3).abs_().sub_(1)
    green = 2 - (sextants - 2).abs_()
    blue = 2 - sextants.sub_(4).abs_()
    return torch.stack([red, green, blue], dim=1).clamp_(0, 1).mul_(colourful[:, None]).add_(black[:, None]).floor_()


def _to_hsv(crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and value, [n, H, W] each in whole numbers from 0 to 255."""
    red, green, blue = crops.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (chroma * 255).div_(value.clamp(min=1)).floor_()
    # One of the three branches of the textbook formula, chosen by products, which are faster than `where` here. The hue
    # of a gray pixel is whatever comes out: its saturation is 0.
    is_red = (red == value).to(value.dtype)
    is_blue = ((green != value).to(value.dtype)).mul_(1 - is_red)
    hue = (green - blue).mul_(is_red)
    hue.addcmul_(blue - red, 1 - is_red - is_blue).addcmul_(red - green, is_blue)
    hue.div_(chroma.clamp_(min=1))
    hue.sub_(is_red.sub_(1).mul_(2)).add_(is_blue.mul_(2))  # 0 sextants on from red, 2 from green, 4 from blue
    hue.add_((hue < 0).to(hue.dtype).mul_(6))
    return hue.mul_(255 / 6).floor_(), saturation, value


def _grayscale(crops: Tensor, parameters: CropParameters, rows: _Rows) -> Tensor:
    return _gray(crops).expand_as(crops)


def _blur(crops: Tensor, parameters: CropParameters, rows: _Rows) -> Tensor:
    """The 9 x 9 Gaussian of each crop's sigma, with reflected borders; one pass an axis, symmetric taps together."""
    offsets = np.arange(_BLUR_RADIUS + 1)
    taps = np.exp(-0.5 * (offsets / parameters.sigma[rows, None]) ** 2)
    taps /= 2 * taps.sum(axis=1, keepdims=True) - taps[:, :1]
    weights = _on_device(taps, crops)[:, :, None, None, None].unbind(1)  # 5 x [n, 1, 1, 1]
    for axis in (2, 3):
        padding = [0, 0, 0, 0]
        padding[6 - 2 * axis : 8 - 2 * axis] = [_BLUR_RADIUS, _BLUR_RADIUS]
        padded = pad(crops, padding, mode="reflect")
        size = crops.shape[axis]
        blurred = padded.narrow(axis, _BLUR_RADIUS, size) * weights[0]
        for offset in range(1, _BLUR_RADIUS + 1):
            pair = padded.narrow(axis, _BLUR_RADIUS - offset, size) + padded.narrow(axis, _BLUR_RADIUS + offset, size)
            blurred.addcmul_(pair, weights[offset])
        crops = blurred
    return crops.round_()


def _solarize(crops: Tensor, parameters: CropParameters, rows: _Rows) -> Tensor:
    return torch.where(crops >= _SOLARIZE_THRESHOLD, 255 - crops, crops)


def _on_device(array: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(like.device, non_blocking=True)
