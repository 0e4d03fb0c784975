"""The multi-crop augmentation for a whole batch of uint8 images at once, on CPU or GPU.

Same laws and same 8-bit arithmetic as `dinov2.data.augmentations`, several times faster on small images: parameters
are drawn for all crops at once (`crop_parameters`), geometry is two matrix products (`resampling`), and colour and blur
work on the crops that drew them (`photometry`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2.data.crop_parameters import CropLaws, CropParameters, draw_crop_parameters
from dinov2.data.photometry import change_appearance
from dinov2.data.resampling import crop_and_resize
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.errors import DataError

__all__ = ["BatchedAugmentation"]


class BatchedAugmentation:
    """Two global and `local_crops_number` local crops of every image of a batch, as a function of the sample numbers.

    The arguments are those of `DataAugmentationDINO`, and `seed`. Images may have any number of channels; saturation,
    hue, grayscale and solarise need three and are left out otherwise.
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
        seed: int = 0,
    ) -> None:
        first, second, local = blur_p
        global_scale = (float(global_crops_scale[0]), float(global_crops_scale[1]))
        local_scale = (float(local_crops_scale[0]), float(local_crops_scale[1]))
        self.laws = CropLaws(
            scales=[global_scale] * 2 + [local_scale] * local_crops_number,
            blur_p=[first, second] + [local] * local_crops_number,
            solarize_p=[0.0, solarize_p] + [0.0] * local_crops_number,
            horizontal_flip_p=horizontal_flip_p,
            color_jitter_p=color_jitter_p,
            color_jitter_strength=color_jitter_strength,
            grayscale_p=grayscale_p,
        )
        self.local_crops_number = local_crops_number
        self.global_crops_size = global_crops_size
        self.local_crops_size = local_crops_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = seed

    def __call__(
        self,
        images: Tensor | Sequence[Tensor],  # uint8 [B, C, H, W], or B times [C, H, W] of any sizes
        sample_numbers: Tensor | NDArray[np.integer[Any]],  # [B]
    ) -> tuple[Tensor, Tensor | None]:
        """Normalised crops, crop-major: global [2*B, C, S, S] and local [L*B, C, s, s], None without local crops."""
        if len(images) == 0 or len(images) != len(sample_numbers):
            raise DataError(
                f"got {len(images)} images and {len(sample_numbers)} sample numbers; one for each is needed"
            )
        sizes = [images.shape[2:]] if isinstance(images, Tensor) else [image.shape[1:] for image in images]
        heights, widths = np.broadcast_to(np.array(sizes), (len(images), 2)).T
        parameters = draw_crop_parameters(
            self.laws, seed=self.seed, sample_numbers=np.asarray(sample_numbers), heights=heights, widths=widths
        )
        global_crops = self._crops(images, parameters.crops(0, 2), self.global_crops_size)
        if self.local_crops_number == 0:
            return global_crops, None
        return global_crops, self._crops(
            images, parameters.crops(2, 2 + self.local_crops_number), self.local_crops_size
        )

    def _crops(self, images: Tensor | Sequence[Tensor], parameters: CropParameters, size: int) -> Tensor:
        boxes = np.stack([parameters.top, parameters.left, parameters.height, parameters.width], axis=-1)
        crops = crop_and_resize(images, torch.from_numpy(boxes), torch.from_numpy(parameters.flip), size)
        crops = change_appearance(crops, parameters)
        std = torch.tensor(self.std, device=crops.device).view(-1, 1, 1)
        mean = torch.tensor(self.mean, device=crops.device).view(-1, 1, 1)
        return crops.mul_(1 / (255 * std)).sub_(mean / std)
