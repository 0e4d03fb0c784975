"""Random parameters of crops, drawn for a whole batch at once: boxes, flips, colour factors, blur widths.

The distributions are those of torchvision's transforms in the arrangement of the release (see `augment_image`); the
draws are hashes of (seed, sample number, crop), so that the crops of a sample do not depend on its batch.
"""

from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.stream import hash_keys, to_unit_interval

__all__ = ["CONTRAST", "HUE", "SATURATION", "CropParameters", "draw_crop_parameters"]

_BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_BOX_TRIES = 10
_LOG_ASPECTS = (np.log(3 / 4), np.log(4 / 3))
_SIGMAS = (0.1, 2.0)
_JITTER_ORDERS = np.array(list(permutations(range(4))))  # [24, 4]
_N_DRAWS = 13 + 2 * _BOX_TRIES


@dataclass(frozen=True, kw_only=True)
class CropParameters:
    """The drawn values of crops, arrays of one leading shape [...]: [K, B], or [n] once some crops are selected."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    order: NDArray[np.int64]
    """[..., 4]: the colour operations (0 is brightness, then `CONTRAST`, ...) in the order of application."""
    factors: NDArray[np.float64]
    """[..., 4]: factor of brightness, contrast, saturation, and shift of hue in turns."""
    grayscale: NDArray[np.bool_]
    blur: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarize: NDArray[np.bool_]

    def crops(self, first: int, last: int) -> "CropParameters":
        """The parameters of crops `first` to `last - 1`, crop-major: [(last - first) * B, ...]."""
        chosen = {field.name: getattr(self, field.name)[first:last] for field in fields(self)}
        return CropParameters(**{name: array.reshape(-1, *array.shape[2:]) for name, array in chosen.items()})


def draw_crop_parameters(
    config: AugmentationConfig,
    *,
    seed: int,
    sample_numbers: NDArray[np.int64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> CropParameters:
    """Draw the parameters of all K crops of B images of the given sizes [B]; the arrays are [K, B]."""
    n_crops = len(config.scale_by_crop)
    crops = np.arange(n_crops)[:, None]
    keys = hash_keys(seed, "crop", np.asarray(sample_numbers), crops)  # [K, B]
    draws = np.moveaxis(to_unit_interval(hash_keys(keys[..., None], np.arange(_N_DRAWS))), -1, 0)  # [draw, K, B]
    scale_low, scale_high = (np.array(bounds)[:, None] for bounds in zip(*config.scale_by_crop, strict=True))
    top, left, height, width = _draw_boxes(draws[13:], draws[0], draws[1], scale_low, scale_high, heights, widths)

    low, high = _factor_ranges(config.color_jitter_strength)
    return CropParameters(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=draws[2] < config.horizontal_flip_p,
        jitter=draws[3] < (config.color_jitter_p if config.color_jitter_strength > 0 else 0),
        order=_JITTER_ORDERS[(draws[4] * len(_JITTER_ORDERS)).astype(np.int64)],
        factors=low + np.moveaxis(draws[5:9], 0, -1) * (high - low),
        grayscale=draws[9] < config.grayscale_p,
        blur=draws[10] < np.array(config.blur_p_by_crop)[:, None],
        sigma=_SIGMAS[0] + draws[11] * (_SIGMAS[1] - _SIGMAS[0]),
        solarize=draws[12] < np.array(config.solarize_p_by_crop)[:, None],
    )


def _draw_boxes(
    tries: NDArray[np.float64],
    u_top: NDArray[np.float64],
    u_left: NDArray[np.float64],
    scale_low: NDArray[np.float64],
    scale_high: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> tuple[NDArray[np.int64], ...]:
    """Top, left, height, width [K, B]: the first of ten tries that fits the image, else the largest central box."""
    u_area, u_aspect = tries[:_BOX_TRIES], tries[_BOX_TRIES:]  # [try, K, B]
    area = heights * widths * (scale_low + u_area * (scale_high - scale_low))
    aspect = np.exp(_LOG_ASPECTS[0] + u_aspect * (_LOG_ASPECTS[1] - _LOG_ASPECTS[0]))
    box_widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    box_heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (box_widths > 0) & (box_widths <= widths) & (box_heights > 0) & (box_heights <= heights)
    chosen = fits.argmax(axis=0)[None]
    height = np.take_along_axis(box_heights, chosen, 0)[0]
    width = np.take_along_axis(box_widths, chosen, 0)[0]
    top = np.floor(u_top * (heights - height + 1)).astype(np.int64)
    left = np.floor(u_left * (widths - width + 1)).astype(np.int64)

    none_fits = ~fits.any(axis=0)
    if none_fits.any():
        central_height = np.minimum(heights, np.rint(widths / (3 / 4)).astype(np.int64))
        central_width = np.minimum(widths, np.rint(heights * (4 / 3)).astype(np.int64))
        height = np.where(none_fits, central_height, height)
        width = np.where(none_fits, central_width, width)
        top = np.where(none_fits, (heights - height) // 2, top)
        left = np.where(none_fits, (widths - width) // 2, left)
    return top, left, height, width


def _factor_ranges(strength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bounds [4] of the factors of brightness, contrast, saturation, and of the shift of hue."""
    spread = strength * np.array([0.4, 0.4, 0.2])
    hue = min(0.5, 0.1 * strength)
    return np.append(np.maximum(0.0, 1 - spread), -hue), np.append(1 + spread, hue)
