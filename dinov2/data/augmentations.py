"""The multi-crop augmentation of DINOv2 for one image, exactly as the release computes and draws it.

It uses torchvision's functions one by one, so that every random draw (all from torch's global generator) is visible.
The blur probabilities are true ones: the release declares (1.0, 0.1, 0.5) for the two global crops and the local ones,
but inverts them on the way, and its models were trained with (0.0, 0.9, 0.5). That is the default here; the intended
values can be asked for. The batched counterpart is `dinov2.data.device_augmentations`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from dinov2.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    GaussianBlur,
    MaybeToTensor,
    make_normalize_transform,
)

__all__ = ["DataAugmentationDINO"]

_ASPECT_RATIOS = [3 / 4, 4 / 3]
_SOLARIZE_THRESHOLD = 128

_Step = Callable[[Any], Any]


class DataAugmentationDINO:
    """Image -> two global crops and `local_crops_number` local ones, in the release's dictionary.

    The image is a PIL one, or a uint8 tensor [C, H, W] of any number of channels; what has no meaning without three
    (saturation, hue, grayscale, solarise) is left out for other numbers. `blur_p` holds the probabilities for the first
    global crop, the second, and local crops. `color_jitter_strength` scales the ranges of all four colour changes.

    The attributes `geometric_augmentation_global`, `geometric_augmentation_local` (image -> crop), `global_transfo1`,
    `global_transfo2` and `local_transfo` (crop -> tensor) are called for each crop and may be replaced.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        blur_p: Sequence[float] = (0.0, 0.9, 0.5),
        horizontal_flip_p: float = 0.5,
        color_jitter_p: float = 0.8,
        color_jitter_strength: float = 1.0,
        grayscale_p: float = 0.2,
        solarize_p: float = 0.2,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.global_crops_scale = list(global_crops_scale)
        self.local_crops_scale = list(local_crops_scale)
        self.local_crops_number = local_crops_number
        self.global_crops_size = global_crops_size
        self.local_crops_size = local_crops_size
        self.horizontal_flip_p = horizontal_flip_p
        self.color_jitter_p = color_jitter_p
        self.grayscale_p = grayscale_p
        self.solarize_p = solarize_p
        self._jitter = _JitterRanges(color_jitter_strength)
        self.normalize = transforms.Compose([MaybeToTensor(), make_normalize_transform(mean, std)])
        # The release's names for the steps, under which they may be replaced.
        first, second, local = (GaussianBlur(p=p) for p in blur_p)
        self.geometric_augmentation_global: _Step = self._global_view
        self.geometric_augmentation_local: _Step = self._local_view
        self.global_transfo1: _Step = partial(self._appearance, blur=first, solarize=False)
        self.global_transfo2: _Step = partial(self._appearance, blur=second, solarize=True)
        self.local_transfo: _Step = partial(self._appearance, blur=local, solarize=False)

    def __call__(self, image: Any) -> dict[str, Any]:
        """Crop `image`; `global_crops_teacher` repeats `global_crops`, `offsets` is empty, as in the release."""
        global_crops = [
            self.global_transfo1(self.geometric_augmentation_global(image)),
            self.global_transfo2(self.geometric_augmentation_global(image)),
        ]
        local_crops = [
            self.local_transfo(self.geometric_augmentation_local(image)) for _ in range(self.local_crops_number)
        ]
        return {
            "global_crops": global_crops,
            "global_crops_teacher": global_crops,
            "local_crops": local_crops,
            "offsets": (),
        }

    def _global_view(self, image: Any) -> Any:
        return self._geometry(image, self.global_crops_scale, self.global_crops_size)

    def _local_view(self, image: Any) -> Any:
        return self._geometry(image, self.local_crops_scale, self.local_crops_size)

    def _geometry(self, image: Any, scale: list[float], size: int) -> Any:
        """Random resized crop and flip."""
        box = transforms.RandomResizedCrop.get_params(image, scale, _ASPECT_RATIOS)
        crop = functional.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        return functional.hflip(crop) if torch.rand(1) < self.horizontal_flip_p else crop

    def _appearance(self, crop: Any, blur: GaussianBlur, *, solarize: bool) -> Tensor:
        """Everything that leaves pixels where they are; ends in a normalised float32 tensor [C, size, size]."""
        in_colour = functional.get_image_num_channels(crop) == 3
        if self.color_jitter_p >= torch.rand(1):
            crop = self._jitter(crop)
        if torch.rand(1) < self.grayscale_p and in_colour:
            crop = functional.rgb_to_grayscale(crop, num_output_channels=3)
        crop = blur(crop)
        if solarize and torch.rand(1) < self.solarize_p and in_colour:
            crop = functional.solarize(crop, _SOLARIZE_THRESHOLD)
        tensor: Tensor = self.normalize(crop)
        return tensor


class _JitterRanges:
    """Brightness, contrast, saturation and hue changes in a random order."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        around_one = [[max(0.0, 1 - strength * width), 1 + strength * width] for width in (0.4, 0.4, 0.2)]
        self.brightness, self.contrast, self.saturation = around_one
        self.hue = [-min(0.5, 0.1 * strength), min(0.5, 0.1 * strength)]

    def __call__(self, crop: Any) -> Any:
        order, *factors = transforms.ColorJitter.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        if self.strength == 0:  # or the way to HSV and back would leave its rounding
            return crop
        three_channels = functional.get_image_num_channels(crop) == 3
        operations = _COLOUR_OPERATIONS if three_channels else _CHANNELWISE_OPERATIONS
        for place in order.tolist():
            crop = operations[place](crop, factors[place])
        return crop


def _scale_channels(crop: Tensor | Image.Image, factor: float) -> Tensor:
    return (_as_tensor(crop) * factor).clamp(0, 255).to(torch.uint8)


def _blend_with_mean(crop: Tensor | Image.Image, factor: float) -> Tensor:
    crop = _as_tensor(crop)
    mean = crop.float().mean(dim=0).round().mean().round()
    return (mean + factor * (crop - mean)).clamp(0, 255).to(torch.uint8)


def _unchanged(crop: Any, factor: float) -> Any:
    return crop


def _as_tensor(crop: Tensor | Image.Image) -> Tensor:
    return crop if isinstance(crop, Tensor) else functional.pil_to_tensor(crop)


_COLOUR_OPERATIONS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)
_CHANNELWISE_OPERATIONS = (_scale_channels, _blend_with_mean, _unchanged, _unchanged)
