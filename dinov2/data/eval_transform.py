"""The preprocessing that travels with a model: resize, crop or pad, to tensor, normalise.

Three ways to fit an image to the patch grid:

- `crop` (the published evaluations): the shorter side becomes 256/224 of the crop, the rule behind the usual 256 and
  224, and the centre is cut out; an image that already has exactly the size of the crop stays as it is. Enlarging a
  32 pixel image to 37 only to crop it again would blur it and cut its border off.
- `aspect`: nothing is cut off. The shorter side becomes `crop_size`, the longer one follows, and both are rounded to
  the nearest multiple of the patch, which changes the aspect ratio by less than a patch. Where that would be more than
  `max_tokens` patches, the image becomes smaller.
- `pad`: no pixel is resampled. Zeros (after normalisation: the mean colour) fill up to the next multiple of the patch,
  half on each side, the odd one at the end. An image of more than `max_tokens` patches is refused.

PIL images with an EXIF orientation are turned upright first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from dinov2.data.decoding import upright
from dinov2.data.image_files import get_image_options
from dinov2.errors import ConfigError, DataError
from dinov2.logging import warn_once

__all__ = [
    "IMAGENET_DEFAULT_MEAN",
    "IMAGENET_DEFAULT_STD",
    "MAX_TOKENS",
    "EvalTransform",
    "Fit",
    "MaybeToTensor",
    "make_classification_eval_transform",
    "make_classification_train_transform",
    "make_normalize_transform",
    "middle_of_strip",
    "pad_to_multiple",
]

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
"""Mean of each RGB channel over ImageNet, for values in [0, 1]."""

IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
"""Standard deviation of each RGB channel over ImageNet, for values in [0, 1]."""

MAX_TOKENS = 16384
"""Patches of one image unless another number is given: attention costs their square, and one image must not set it."""

Fit = Literal["crop", "aspect", "pad"]
"""Rule that brings an image to a multiple of the patch size."""

_FITS = ("crop", "aspect", "pad")
_LONGEST_CROPPED = 16  # times the shorter side: what a resize before a crop may cost


def pad_to_multiple(image: Tensor, patch_size: int) -> Tensor:  # [..., H, W] -> [..., h*p, w*p]
    """Zeros around an image up to the next multiple of the patch, half on each side, the odd one at the end."""
    height, width = (-side % patch_size for side in image.shape[-2:])
    if not height and not width:
        return image
    return F.pad(image, (width // 2, width - width // 2, height // 2, height - height // 2))


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Image (PIL or uint8 tensor [C, H, W]) to a normalised float32 tensor [C, h*p, w*p].

    Raises `ConfigError` for sizes that are not positive or an unknown fit; a call raises `DataError` for an image that
    `max_tokens` patches cannot show.
    """

    crop_size: int = 224
    resize_size: int = 0
    """Shorter side before a centre crop; 0 for 256/224 of the crop, while images of its size stay as they are."""
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    patch_size: int = 14
    """For the fits `aspect` and `pad` alone."""
    fit: Fit = "crop"
    max_tokens: int = MAX_TOKENS
    """Largest number of patches of an image, for the fits `aspect` and `pad` alone."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"the largest number of tokens of an image is {self.max_tokens}; write 1 or more")
        if self.crop_size < 1 or self.resize_size < 0 or self.patch_size < 1:
            raise ConfigError(
                f"evaluation images cannot be resized to {self.resize_size} and cropped to {self.crop_size} pixels; "
                "the crop must be positive, and a resize of 0 stands for 256/224 of it"
            )
        if self.fit not in _FITS:
            raise ConfigError(f"no way to fit images is called {self.fit!r}; choose one of {', '.join(_FITS)}")
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def with_(
        self,
        *,
        crop_size: int | None = None,
        resize_size: int | None = None,
        fit: Fit | None = None,
        patch_size: int | None = None,
        max_tokens: int | None = None,
    ) -> "EvalTransform":
        """The same transform with another size or fit; a new `crop_size` alone brings its own resize by the rule."""
        if resize_size is None:
            resize_size = self.resize_size if crop_size is None else 0
        return replace(
            self,
            crop_size=crop_size or self.crop_size,
            resize_size=resize_size,
            patch_size=patch_size or self.patch_size,
            fit=fit or self.fit,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
        )

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Image.Image):
            image = upright(image)
        width, height = image.shape[-1:-3:-1] if isinstance(image, Tensor) else image.size
        if self.fit == "pad":
            self._check_tokens((-(-height // self.patch_size), -(-width // self.patch_size)), height, width)
            return pad_to_multiple(self._exact(image), self.patch_size)
        if self.fit == "aspect":
            size = [side * self.patch_size for side in self._grid(height, width)]
            if [height, width] != size:
                image = functional.resize(image, size, interpolation=InterpolationMode.BICUBIC)
            return self._exact(image)
        image = middle_of_strip(image, height, width)
        if self.resize_size or not width == height == self.crop_size:
            shorter = self.resize_size or round(self.crop_size * 256 / 224)
            image = functional.resize(image, shorter, interpolation=InterpolationMode.BICUBIC)
            image = functional.center_crop(image, [self.crop_size])
        return self._exact(image)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches under the fit `aspect`."""
        scale = self.crop_size / min(height, width) / self.patch_size
        rows, columns = (max(1, round(side * scale)) for side in (height, width))
        if rows * columns <= self.max_tokens:
            return rows, columns
        shrink = math.sqrt(self.max_tokens / (rows * columns))
        fewer = max(1, int(rows * shrink)), max(1, int(columns * shrink))
        self._check_tokens(fewer, height, width)
        warn_once(
            f"max_tokens {self.max_tokens}",
            f"an image of {width} x {height} pixels is shrunk to {fewer[1]} x {fewer[0]} patches, because {columns} x "
            f"{rows} are more than {self.max_tokens:,} tokens; --max-tokens (max_tokens) sets another limit, and later "
            "images are shrunk without a warning",
        )
        return fewer

    def _check_tokens(self, grid: tuple[int, int], height: int, width: int) -> None:
        if (count := math.prod(grid)) > self.max_tokens:
            raise DataError(
                f"an image of {width} x {height} pixels takes {count:,} tokens with the fit {self.fit}, and "
                f"{self.max_tokens:,} are allowed; crop or shrink it, or raise --max-tokens (max_tokens)"
            )

    def _exact(self, image: Image.Image | Tensor) -> Tensor:
        return functional.normalize(MaybeToTensor()(image), list(self.mean), list(self.std))

    def describe(self) -> dict[str, object]:
        """The transform as plain values, for result rows and cache keys."""
        colours: dict[str, object] = {"mean": list(self.mean), "std": list(self.std)}
        if (rule := get_image_options().intensity) != "auto":
            colours["intensity"] = rule
        if self.fit != "crop":
            colours["max_tokens"] = self.max_tokens
        if self.fit == "pad":
            return {"resize": "none", "pad_to": self.patch_size, **colours}
        bicubic = {"interpolation": InterpolationMode.BICUBIC.value, "antialias": True}
        if self.fit == "aspect":
            sides = f"shorter {self.crop_size}, both rounded to multiples of {self.patch_size}"
            return {"resize": sides, **bicubic, **colours}
        rule = "none for images of the crop size, else 256/224 of it"
        return {"resize": self.resize_size or rule, "crop": self.crop_size, **bicubic, **colours}


def middle_of_strip(image: Any, height: int, width: int) -> Any:
    """The middle of an image that is very long and thin, for a resize and a centre crop; other images as they are.

    It holds more around the crop than the resize reads, so that only rounding differs from resizing the whole strip.
    """
    longest = _LONGEST_CROPPED * min(height, width)
    if max(height, width) <= longest:
        return image
    # The same parity, so that the centre stays where it is.
    rows, columns = (side if side <= longest else longest + (side - longest) % 2 for side in (height, width))
    return functional.crop(image, (height - rows) // 2, (width - columns) // 2, rows, columns)


class MaybeToTensor:
    """PIL image or uint8 tensor to float32 [C, H, W] in [0, 1]; a float tensor stays what it is."""

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return image if image.is_floating_point() else functional.convert_image_dtype(image, torch.float32)
        tensor: Tensor = functional.to_tensor(image)
        return tensor

    def __repr__(self) -> str:
        return "MaybeToTensor()"


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
