"""Transforms of the classification evaluations: resize, crop, to tensor, normalise.

The names and defaults are the release's. One thing is wider here: an image may also be a uint8 tensor [C, H, W] with
any number of channels, which is scaled to [0, 1] like a PIL image (the release left it as it was and failed later).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

__all__ = [
    "IMAGENET_DEFAULT_MEAN",
    "IMAGENET_DEFAULT_STD",
    "GaussianBlur",
    "MaybeToTensor",
    "make_classification_eval_transform",
    "make_classification_train_transform",
    "make_normalize_transform",
]

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
"""Mean of each RGB channel over ImageNet, for values in [0, 1]."""

IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
"""Standard deviation of each RGB channel over ImageNet, for values in [0, 1]."""


class MaybeToTensor:
    """PIL image or uint8 tensor to float32 [C, H, W] in [0, 1]; a float tensor stays what it is."""

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Tensor):
            return image if image.is_floating_point() else functional.convert_image_dtype(image, torch.float32)
        tensor: Tensor = functional.to_tensor(image)
        return tensor

    def __repr__(self) -> str:
        return "MaybeToTensor()"


class GaussianBlur:
    """Blur with a 9 x 9 Gaussian of random sigma, with probability `p`; draws from torch's global generator.

    `p` is the true probability. The class of that name in the release blurred with probability 1 - p.
    """

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        self.p = p
        self.radius_min = radius_min
        self.radius_max = radius_max

    def __call__(self, image: Any) -> Any:
        if self.p < torch.rand(1):
            return image
        sigma = transforms.GaussianBlur.get_params(self.radius_min, self.radius_max)
        return functional.gaussian_blur(image, [9, 9], [sigma, sigma])

    def __repr__(self) -> str:
        return f"GaussianBlur(p={self.p}, radius_min={self.radius_min}, radius_max={self.radius_max})"


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Normalize:
    """(x - mean) / std per channel; one value each serves any number of channels."""
    return transforms.Normalize(mean=list(mean), std=list(std))


def make_classification_train_transform(
    *,
    crop_size: int = 224,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """For linear probes: random resized crop (8 to 100 % of the area) and flip; image -> [C, crop, crop] float32."""
    steps: list[Callable[[Any], Any]] = [transforms.RandomResizedCrop(crop_size, interpolation=interpolation)]
    if hflip_prob > 0.0:
        steps.append(transforms.RandomHorizontalFlip(hflip_prob))
    steps += [MaybeToTensor(), make_normalize_transform(mean=mean, std=std)]
    return transforms.Compose(steps)


def make_classification_eval_transform(
    *,
    resize_size: int = 256,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Shorter side to `resize_size`, centre crop (black where too small); image -> [C, crop, crop] float32."""
    return transforms.Compose(
        [
            transforms.Resize(resize_size, interpolation=interpolation),
            transforms.CenterCrop(crop_size),
            MaybeToTensor(),
            make_normalize_transform(mean=mean, std=std),
        ]
    )
