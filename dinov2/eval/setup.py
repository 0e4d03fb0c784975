"""What the release's evaluation commands have in common: their flags, and the transform of evaluation images.

The size of the images is a setting here, not a constant of a command: the shorter side becomes 256/224 of the crop, the
rule behind the usual 256 and 224, unless an image already has exactly the size of the crop. Enlarging a 32 pixel
image to 37 only to crop it again would blur it and cut its border off.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms import InterpolationMode

from dinov2.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    MaybeToTensor,
    make_classification_eval_transform,
    make_normalize_transform,
)
from dinov2.errors import ConfigError

__all__ = ["EvalTransform", "eval_transform_for", "get_args_parser"]


class EvalTransform:
    """Image (PIL or uint8 tensor [C, H, W]) to a normalised float32 tensor [C, crop_size, crop_size].

    `resize_size` is the length of the shorter side before the centre crop. 0 stands for the rule: 256/224 of the crop,
    and no resampling at all of images that have the size of the crop already.
    """

    def __init__(
        self,
        *,
        crop_size: int = 224,
        resize_size: int = 0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if crop_size < 1 or resize_size < 0:
            raise ConfigError(
                f"evaluation images cannot be resized to {resize_size} and cropped to {crop_size} pixels; "
                "the crop must be positive, and a resize of 0 stands for 256/224 of it"
            )
        self.crop_size, self.resize_size = crop_size, resize_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.keeps_exact_size = resize_size == 0
        self._resized = make_classification_eval_transform(
            resize_size=resize_size or round(crop_size * 256 / 224), crop_size=crop_size, mean=mean, std=std
        )
        self._to_tensor = MaybeToTensor()
        self._normalize = make_normalize_transform(mean=mean, std=std)

    def __call__(self, image: Any) -> Tensor:
        width, height = image.shape[-1:-3:-1] if isinstance(image, Tensor) else image.size
        if self.keeps_exact_size and width == height == self.crop_size:
            exact: Tensor = self._normalize(self._to_tensor(image))
            return exact
        resized: Tensor = self._resized(image)
        return resized

    def describe(self) -> dict[str, Any]:
        """The transform as plain values, for result rows and cache keys."""
        rule = "none for images of the crop size, else 256/224 of it"
        return {
            "resize": rule if self.keeps_exact_size else self.resize_size,
            "crop": self.crop_size,
            "interpolation": InterpolationMode.BICUBIC.value,
            "antialias": True,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __repr__(self) -> str:
        return f"EvalTransform(crop_size={self.crop_size}, resize_size={self.resize_size})"


def eval_transform_for(cfg: Any) -> EvalTransform:
    """The transform of a training config: its global crop size and normalisation, `evaluation.resize_size`."""
    return EvalTransform(
        crop_size=cfg.crops.global_crops_size,
        resize_size=getattr(cfg.evaluation, "resize_size", 0),
        mean=getattr(cfg.crops, "mean", IMAGENET_DEFAULT_MEAN),
        std=getattr(cfg.crops, "std", IMAGENET_DEFAULT_STD),
    )


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags that all evaluation commands of the release share."""
    parser = argparse.ArgumentParser(description=description, parents=list(parents), add_help=add_help)
    parser.add_argument("--config-file", type=str, help="YAML file of the model")
    parser.add_argument("--pretrained-weights", type=str, help="weight file or a run's folder")
    parser.add_argument("--output-dir", default="", type=str, help="where results are written")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY=VALUE", help="config overrides")
    return parser
