"""Resizes learned position embeddings to another patch grid, by two small matrix products.

Bicubic resampling is linear and separable, so a grid `[M, M']` becomes `rows @ grid @ columns.T`. The figures are those
of the framework's bicubic operator (with and without antialias), but nothing except arithmetic is needed: it exports,
compiles and runs on every device.

Two rules exist, and which one a model was trained with is part of its weights:
- *offset* (models without registers): the source position of output i is `(i + 0.5) * M / (target + offset) - 0.5`;
- *size* (offset 0): `(i + 0.5) * M / target - 0.5`.
"""

from functools import partial

import torch
from torch import Tensor

__all__ = ["cubic_resize_matrix", "resize_pos_embed"]

# The kernel parameter that image libraries use without and with antialiasing.
_PLAIN_A, _ANTIALIAS_A = -0.75, -0.5


def resize_pos_embed(
    pos_embed: Tensor,  # [1, 1 + gh*gw, D], the class token first
    native_grid: tuple[int, int],
    grid: tuple[int, int],
    *,
    offset: float = 0.1,
    antialias: bool = False,
) -> Tensor:  # [1, 1 + h*w, D], float32
    """Position embedding for a patch grid `(h, w)`; the class token's entry stays as it is.

    The native grid itself is returned unchanged.
    """
    if grid == native_grid:
        return pos_embed
    class_pos, patch_pos = pos_embed.float().split([1, pos_embed.shape[1] - 1], dim=1)
    resize = partial(cubic_resize_matrix, offset=offset, antialias=antialias, device=pos_embed.device)
    rows = resize(native_grid[0], grid[0])  # [h, gh]
    columns = resize(native_grid[1], grid[1])  # [w, gw]
    with torch.autocast(pos_embed.device.type, enabled=False):
        patch_pos = patch_pos.reshape(*native_grid, -1).permute(2, 0, 1)  # [D, gh, gw]
        patch_pos = rows @ patch_pos @ columns.T  # [D, h, w]
    return torch.cat([class_pos, patch_pos.permute(1, 2, 0).flatten(0, 1)[None]], dim=1)


def cubic_resize_matrix(
    source: int,
    target: int,
    *,
    offset: float = 0.0,
    antialias: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """The matrix `[target, source]`, float32, that resamples a line of `source` values to `target` values."""
    # float64: the reference derives its sampling positions from Python floats.
    float64 = torch.float64 if device is None or device.type != "mps" else torch.float32
    position = torch.arange(target, device=device, dtype=float64)[:, None] + 0.5  # [target, 1]
    step = source / (target + offset)
    taps = torch.arange(source, device=device, dtype=float64)[None]  # [1, source]
    if antialias:
        width = max(step, 1.0)
        weights = _cubic((taps + 0.5 - position * step) / width, _ANTIALIAS_A)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return weights.float()
    centre = position * step - 0.5
    below = centre.floor()
    weights = torch.zeros(1, device=device, dtype=float64)
    for tap in (-1, 0, 1, 2):
        # Taps beyond the border read the border's value.
        index = (below + tap).clamp(0, source - 1)
        weights = weights + _cubic(centre - below - tap, _PLAIN_A) * (index == taps)
    return weights.float()


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel; zero from distance 2 on."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
