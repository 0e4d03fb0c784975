"""The multi-crop augmentation of one image, exactly as the release computes and draws it.

It uses torchvision's functions one by one, so that every random draw (all from torch's global generator) is visible.
`blur_p` holds true probabilities: the release declares (1.0, 0.1, 0.5) for the two global crops and the local ones, but
inverts them on the way, and its models were trained with (0.0, 0.9, 0.5), the default here.

An image is a PIL one, or a uint8 tensor [C, H, W] of any number of channels; what has no meaning without three
(saturation, hue, grayscale, solarise) is left out for other numbers.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.eval_transform import MaybeToTensor

__all__ = ["Picture", "augment_image", "blur_at_random", "crop_at_random", "disturb_color"]

_ASPECT_RATIOS = [3 / 4, 4 / 3]
_SOLARIZE_THRESHOLD = 128

Picture = Image.Image | Tensor
"""An image or a crop before it is normalised."""


def augment_image(image: Picture, config: AugmentationConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Two global crops and `local_crops_number` local ones, normalised float32 tensors [C, size, size]."""
    crops = []
    for number, (scale, blur_p) in enumerate(zip(config.scale_by_crop, config.blur_p_by_crop, strict=True)):
        size = config.global_crops_size if number < 2 else config.local_crops_size
        crop = crop_at_random(image, scale, size, config.horizontal_flip_p)
        crops.append(disturb_color(crop, config, blur_p=blur_p, solarize=number == 1))
    return crops[:2], crops[2:]


def crop_at_random(image: Picture, scale: Sequence[float], size: int, flip_p: float) -> Picture:
    """A box of a random share `scale` of the area and random aspect, resized to `size` and flipped at random."""
    box = transforms.RandomResizedCrop.get_params(image, list(scale), _ASPECT_RATIOS)
    crop = functional.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return functional.hflip(crop) if torch.rand(1) < flip_p else crop


def disturb_color(crop: Picture, config: AugmentationConfig, *, blur_p: float, solarize: bool) -> Tensor:
    """Jitter, grayscale, blur, and solarise where that is drawn, at random; normalised float32 [C, size, size]."""
    has_color = functional.get_image_num_channels(crop) == 3
    if config.color_jitter_p >= torch.rand(1):
        crop = _jitter(crop, config.color_jitter_strength)
    if torch.rand(1) < config.grayscale_p and has_color:
        crop = functional.rgb_to_grayscale(crop, num_output_channels=3)
    crop = blur_at_random(crop, blur_p)
    if solarize and torch.rand(1) < config.solarize_p and has_color:
        crop = functional.solarize(crop, _SOLARIZE_THRESHOLD)
    return functional.normalize(MaybeToTensor()(crop), list(config.mean), list(config.std))


def blur_at_random(image: Picture, p: float, radius_min: float = 0.1, radius_max: float = 2.0) -> Picture:
    """A 9 x 9 Gaussian of random sigma, with probability `p`."""
    if p < torch.rand(1):
        return image
    sigma = transforms.GaussianBlur.get_params(radius_min, radius_max)
    return functional.gaussian_blur(image, [9, 9], [sigma, sigma])


def _jitter(crop: Picture, strength: float) -> Picture:
    """Brightness, contrast, saturation and hue changes in a random order."""
    around_one = [[max(0.0, 1 - strength * width), 1 + strength * width] for width in (0.4, 0.4, 0.2)]
    hue = [-min(0.5, 0.1 * strength), min(0.5, 0.1 * strength)]
    order, *factors = transforms.ColorJitter.get_params(*around_one, hue)
    if strength == 0:  # or the way to HSV and back would leave its rounding
        return crop
    has_color = functional.get_image_num_channels(crop) == 3
    operations = _COLOR_OPERATIONS if has_color else _CHANNELWISE_OPERATIONS
    for place in order.tolist():
        crop = operations[place](crop, factors[place])
    return crop


def _scale_channels(crop: Picture, factor: float) -> Tensor:
    return (_as_tensor(crop) * factor).clamp(0, 255).to(torch.uint8)


def _blend_with_mean(crop: Picture, factor: float) -> Tensor:
    crop = _as_tensor(crop)
    mean = crop.float().mean(dim=0).round().mean().round()
    return (mean + factor * (crop - mean)).clamp(0, 255).to(torch.uint8)


def _unchanged(crop: Picture, factor: float) -> Picture:
    return crop


def _as_tensor(crop: Picture) -> Tensor:
    return crop if isinstance(crop, Tensor) else functional.pil_to_tensor(crop)


_Operations = Sequence[Callable[[Picture, float], Picture]]
_COLOR_OPERATIONS: _Operations = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)
_CHANNELWISE_OPERATIONS: _Operations = (_scale_channels, _blend_with_mean, _unchanged, _unchanged)
