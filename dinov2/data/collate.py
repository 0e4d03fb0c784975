"""From single samples to the batch of a training step.

`CropBatch` is what the training code here reads. `collate_data_and_cast` makes the release's dictionary, draw by draw
(Python's global `random`), and `CropBatch.from_dict` takes one; its padded size `upperbound` has no use here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.masking import MaskingGenerator
from dinov2.errors import DataError

__all__ = ["CropBatch", "collate_data_and_cast", "stack_crops"]


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """The crops of B images and their masks, crop-major: row `g * B + b` is crop g of image b."""

    global_crops: Tensor
    """[G*B, C, S, S], normalised."""
    local_crops: Tensor | None
    """[L*B, C, s, s], normalised; None without local crops."""
    masks: Tensor
    """[G*B, N] bool, True where a patch of a global crop is masked."""
    masked_indices: Tensor
    """[M] int64, the True places of `masks` flattened, ascending."""
    mask_weights: Tensor
    """[M] float32, one over the number of masked patches in the same crop."""
    sample_numbers: Tensor
    """[B] int64, place of each image in the sample stream; -1 where unknown."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of every image that could not be read and was replaced."""

    @classmethod
    def of(
        cls,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: Tensor,
        *,
        sample_numbers: Tensor,
        failures: Sequence[tuple[str, str]] = (),
    ) -> "CropBatch":
        """A batch from crops and masks; works out the indices and weights of the masked patches."""
        masked_indices, mask_weights = _masked_patches(masks)
        return cls(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            masked_indices=masked_indices,
            mask_weights=mask_weights,
            sample_numbers=sample_numbers,
            failures=list(failures),
        )

    @classmethod
    def from_dict(cls, collated: Mapping[str, Any]) -> "CropBatch":
        """A batch from the release's dictionary (of two global crops an image), as `collate_data_and_cast` makes it."""
        global_crops = collated["collated_global_crops"]
        local_crops = collated.get("collated_local_crops")
        return cls(
            global_crops=global_crops,
            local_crops=None if local_crops is None or len(local_crops) == 0 else local_crops,
            masks=collated["collated_masks"],
            masked_indices=collated["mask_indices_list"],
            mask_weights=collated["masks_weight"],
            sample_numbers=torch.full((len(global_crops) // 2,), -1),
        )

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> "CropBatch":
        """The batch on `device`; `dtype`, if given, is that of the crops alone. `sample_numbers` stay on the host."""

        def move(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=non_blocking)

        return replace(
            self,
            global_crops=move(self.global_crops, dtype),
            local_crops=None if self.local_crops is None else move(self.local_crops, dtype),
            masks=move(self.masks),
            masked_indices=move(self.masked_indices),
            mask_weights=move(self.mask_weights),
        )

    def pin_memory(self) -> "CropBatch":
        """The batch in page-locked memory, so that copies to a CUDA device can overlap with its work."""
        return replace(
            self,
            global_crops=self.global_crops.pin_memory(),
            local_crops=None if self.local_crops is None else self.local_crops.pin_memory(),
            masks=self.masks.pin_memory(),
            masked_indices=self.masked_indices.pin_memory(),
            mask_weights=self.mask_weights.pin_memory(),
        )

    def device_tensors(self) -> list[Tensor]:
        """The tensors that `to` moves."""
        tensors = [self.global_crops, self.local_crops, self.masks, self.masked_indices, self.mask_weights]
        return [tensor for tensor in tensors if tensor is not None]


def stack_crops(crops_of_samples: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Stack lists of crops, one list a sample, to [crops*B, C, H, W]; None where there are none."""
    crops = [crop for same_place in zip(*crops_of_samples, strict=True) for crop in same_place]
    return torch.stack(crops) if crops else None


def collate_data_and_cast(
    samples_list: Sequence[tuple[Mapping[str, Any], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: MaskingGenerator | None = None,
) -> dict[str, Any]:
    """The release's collate function: samples (augmentation dictionary, target) to its dictionary of a batch.

    `n_tokens` is the number of patches N of a global crop (default: those of the generator's grid). Ratios and the
    order of masks come from Python's global `random`, the shapes from the generator's own source. Without local crops
    `collated_local_crops` is None.
    """
    if mask_generator is None:
        raise DataError("collate_data_and_cast got no mask_generator; pass a MaskingGenerator for the patch grid")
    if n_tokens is None:
        n_tokens = mask_generator.num_patches
    global_crops = stack_crops([sample[0]["global_crops"] for sample in samples_list])
    local_crops = stack_crops([sample[0]["local_crops"] for sample in samples_list])
    if global_crops is None:
        raise DataError("the samples hold no global crops; each needs a dictionary with the list 'global_crops'")

    n_crops = len(global_crops)
    n_masked_crops = int(n_crops * mask_probability)
    ladder = torch.linspace(*mask_ratio_tuple, n_masked_crops + 1)
    upperbound = 0
    masks = []
    for low, high in pairwise(ladder):
        ratio = low + (high - low) * random.random()  # in float32, as the release draws it
        masks.append(mask_generator(int(n_tokens * ratio)))
        upperbound += int(n_tokens * high)
    masks += [mask_generator(0) for _ in range(n_crops - n_masked_crops)]
    random.shuffle(masks)

    collated_masks = torch.from_numpy(np.stack(masks)).flatten(1)  # [G*B, N]
    mask_indices_list, masks_weight = _masked_patches(collated_masks)
    return {
        "collated_global_crops": global_crops.to(dtype),
        "collated_local_crops": None if local_crops is None else local_crops.to(dtype),
        "collated_masks": collated_masks,
        "mask_indices_list": mask_indices_list,
        "masks_weight": masks_weight,
        "upperbound": upperbound,
        "n_masked_patches": torch.full((1,), len(mask_indices_list), dtype=torch.long),
    }


def _masked_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices [M] and weights [M] of the masked patches of `masks` [G*B, N]."""
    per_crop = 1.0 / masks.sum(dim=1).clamp(min=1.0)  # [G*B]
    indices = masks.flatten().nonzero().flatten()
    return indices, per_crop[indices // masks.shape[1]]
