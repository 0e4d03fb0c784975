"""Checks of what callers hand to a backbone, in words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.layers.recording import is_recording

__all__ = ["check_intermediate_layers", "check_mask", "check_masks"]


def check_mask(mask: Tensor, patches: Tensor) -> None:
    """A mask for patch tokens `[B, N, D]` is boolean `[B, N]`; raises `ValueError` for another."""
    if not is_recording() and (mask.dtype != torch.bool or mask.shape != patches.shape[:2]):
        raise ValueError(
            f"masks are {mask.dtype} of the shape {list(mask.shape)}; give booleans [B, N] = {list(patches.shape[:2])}"
        )


def check_masks(masks: Sequence[Tensor | None] | None, n_images: int) -> list[Tensor | None]:
    """One mask (or None) for each image tensor of a list; raises `ValueError` when the counts differ."""
    if masks is None:
        return [None] * n_images
    if isinstance(masks, Tensor) or len(masks) != n_images:
        got = "one tensor" if isinstance(masks, Tensor) else f"{len(masks)} masks"
        raise ValueError(f"{n_images} image tensors came with {got}; give a list with a mask or None for each")
    return list(masks)


def check_intermediate_layers(n: int | Sequence[int], depth: int) -> set[int]:
    """Block indices meant by `n`: its last `n`, or the ones listed; raises `ValueError` when one does not exist."""
    if isinstance(n, int):
        if not 0 <= n <= depth:
            raise ValueError(f"n is {n}; this model has {depth} blocks")
        return set(range(depth - n, depth))
    chosen = {index + depth if index < 0 else index for index in n}
    if len(chosen) != len(list(n)) or not chosen <= set(range(depth)):
        raise ValueError(f"only distinct blocks 0 to {depth - 1} exist in this model, got n={list(n)}")
    return chosen
