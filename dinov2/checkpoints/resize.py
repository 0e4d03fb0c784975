"""The same backbone for another image size, patch size or number of channels: new tensors, never done unasked.

- *Image size*: the position grid is resampled by the model's own rule (`dinov2.layers.pos_embed`), as the model itself
  does at every other size; grids need not be square.
- *Patch size*: each patch kernel is multiplied by the pseudo-inverse of the matrix that resizes patches bilinearly
  (arXiv 2212.08013), so that a patch enlarged to the new size gives the token of the original one. The number of
  patches stays, unless an image size is asked for as well.
- *Channels*: one channel gets the sum of all kernels, so that a grey image gives the tokens of its copy in all
  channels; more channels repeat the kernels in turn, scaled by old over new count, so that tokens keep their size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.models.config import BackboneConfig

__all__ = ["Resized", "resize_model", "resize_patch_kernel"]

_KERNEL = "patch_embed.proj.weight"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Resized(NamedTuple):
    """A backbone's tensors and architecture after the changes, and a sentence for each change."""

    state: dict[str, Tensor]
    config: BackboneConfig
    notes: tuple[str, ...]


def resize_model(
    state: Mapping[str, Tensor],
    config: BackboneConfig,
    *,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
) -> Resized:
    """A copy of backbone tensors (the release's keys) and their architecture for other sizes; the rest is shared.

    `img_size` is one side or height and width. Raises `WeightsError` for sizes that are no multiple of the patch.
    """
    result, notes = dict(state), []
    if in_chans is not None and in_chans != config.in_chans:
        if in_chans < 1:
            raise WeightsError(f"a model cannot have {in_chans} input channels; give at least 1")
        result[_KERNEL] = _other_channels(result[_KERNEL], in_chans)
        how = "kernels summed" if in_chans == 1 else "kernels repeated in turn"
        notes.append(f"channels {config.in_chans} -> {in_chans} ({how})")
        mean, std = (_statistics(v or usual, in_chans) for v, usual in ((config.mean, _MEAN), (config.std, _STD)))
        config = replace(config, in_chans=in_chans, mean=mean, std=std)
    patch = config.patch_size if patch_size is None else patch_size
    if patch < 1:
        raise WeightsError(f"a patch cannot be {patch} pixels wide; give at least 1")
    rows, columns = (side // config.patch_size for side in config.img_size)
    if patch != config.patch_size:
        result[_KERNEL] = resize_patch_kernel(result[_KERNEL], patch)
        change = f"{config.patch_size} -> {patch}"
        notes.append(f"patch size {change} (kernels resized by the pseudo-inverse of bilinear resizing)")
        config = replace(config, patch_size=patch, img_size=(rows * patch, columns * patch))
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(int(side) for side in img_size)
        if len(size) != 2 or any(side < patch or side % patch for side in size):
            shown = "x".join(str(side) for side in size)
            raise WeightsError(f"images of {shown} pixels are no whole number of patches of {patch}; give a multiple")
        target = (size[0] // patch, size[1] // patch)
        config = replace(config, img_size=(size[0], size[1]))
        if target != (rows, columns):
            position, offset, antialias = result["pos_embed"], config.interpolate_offset, config.interpolate_antialias
            resized = resize_pos_embed(position, (rows, columns), target, offset=offset, antialias=antialias)
            result["pos_embed"] = resized.to(position.dtype)
            change = f"{rows}x{columns} -> {target[0]}x{target[1]}"
            notes.append(f"position grid {change} (resampled by the model's rule)")
    return Resized(result, config, tuple(notes))


def resize_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:  # [D, C, p, p] -> [D, C, p', p']
    """Patch kernels for patches of another size, by the pseudo-inverse of bilinear resizing (arXiv 2212.08013).

    For a larger size the products with bilinearly enlarged patches equal the original ones; for a smaller one they are
    the nearest in the least-squares sense.
    """
    resize = _linear_resize_matrix(kernel.shape[-1], patch_size)  # [p', p]
    inverse = torch.linalg.pinv(resize.T)  # [p', p]
    return (inverse @ kernel.double() @ inverse.T).to(kernel.dtype)


def _linear_resize_matrix(source: int, target: int) -> Tensor:  # [target, source], float64
    """Resizes a line of values by a triangle kernel, widened when shrinking so that no value is skipped."""
    step = source / target
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * step - 0.5
    distance = (torch.arange(source, dtype=torch.float64)[None] - centre) / max(step, 1.0)
    weights = (1 - distance.abs()).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def _other_channels(kernel: Tensor, in_chans: int) -> Tensor:  # [D, C, p, p] -> [D, C', p, p]
    old = kernel.shape[1]
    if in_chans == 1:
        return kernel.sum(dim=1, keepdim=True)
    return kernel[:, torch.arange(in_chans) % old] * (old / in_chans)


def _statistics(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if in_chans == 1:
        return (sum(values) / len(values),)
    return tuple(values[index % len(values)] for index in range(in_chans))
