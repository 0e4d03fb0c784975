"""The batch of a training step: crops, masks, and the places of the masked patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from torch import Tensor

__all__ = ["CollatedBatch", "CropBatch", "masked_patches", "stack_crops"]


class CollatedBatch(TypedDict):
    """The release's dictionary of a batch, by its names; `upperbound` has no use here."""

    collated_global_crops: Tensor
    collated_local_crops: Tensor | None
    collated_masks: Tensor
    mask_indices_list: Tensor
    masks_weight: Tensor
    upperbound: int
    n_masked_patches: Tensor


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """The crops of B images and their masks, crop-major: row `g * B + b` is crop g of image b."""

    global_crops: Tensor
    """[G*B, C, H, W], normalised."""
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
    failures: Sequence[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of every image that could not be read and was replaced."""

    @classmethod
    def from_crops(
        cls,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: Tensor,
        *,
        sample_numbers: Tensor,
        failures: Sequence[tuple[str, str]] = (),
    ) -> "CropBatch":
        """A batch from crops and masks; computes the indices and weights of the masked patches."""
        masked_indices, mask_weights = masked_patches(masks)
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
    def from_dict(cls, collated: CollatedBatch) -> "CropBatch":
        """A batch from the release's dictionary, with two global crops an image, of `collate_data_and_cast`."""
        global_crops, local_crops = collated["collated_global_crops"], collated.get("collated_local_crops")
        return cls(
            global_crops=global_crops,
            local_crops=None if local_crops is None or len(local_crops) == 0 else local_crops,
            masks=collated["collated_masks"],
            masked_indices=collated["mask_indices_list"],
            mask_weights=collated["masks_weight"],
            sample_numbers=torch.full((len(global_crops) // 2,), -1),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "CropBatch":
        """The batch on `device`; `sample_numbers` stay on the host."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CropBatch":
        """The batch in page-locked memory, so that copies to a CUDA device can overlap with its work."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def device_tensors(self) -> list[Tensor]:
        """The tensors that `to` moves."""
        tensors = [self.global_crops, self.local_crops, self.masks, self.masked_indices, self.mask_weights]
        return [tensor for tensor in tensors if tensor is not None]

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "CropBatch":
        return replace(
            self,
            global_crops=change(self.global_crops),
            local_crops=None if self.local_crops is None else change(self.local_crops),
            masks=change(self.masks),
            masked_indices=change(self.masked_indices),
            mask_weights=change(self.mask_weights),
        )


def masked_patches(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices [M] and weights [M] of the masked patches of `masks` [G*B, N]."""
    per_crop = 1.0 / masks.sum(dim=1).clamp(min=1.0)  # [G*B]
    indices = masks.flatten().nonzero().flatten()
    return indices, per_crop[indices // masks.shape[1]]


def stack_crops(crops_by_sample: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Stack lists of crops, one list a sample, to [crops*B, C, H, W]; None where there are none."""
    crops = [crop for same_place in zip(*crops_by_sample, strict=True) for crop in same_place]
    return torch.stack(crops) if crops else None
