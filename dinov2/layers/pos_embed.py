"""Resizes learned position embeddings to another patch grid, by two small matrix products.

Bicubic resampling is linear and separable, so a grid `[M, M']` becomes `rows @ grid @ columns.T`. The figures are those
of the framework's bicubic operator (with and without antialias), but nothing except arithmetic is needed: it exports,
compiles and runs on every device.

Two rules exist, and which one a model was trained with is part of its weights:
- *offset* (models without registers): the source position of output i is `(i + 0.5) * M / (target + offset) - 0.5`;
- *size* (offset 0): `(i + 0.5) * M / target - 0.5`.

Without antialiasing the offset rule also moves an axis whose size stays the same; with it that axis is left alone.

While a graph is being recorded (`torch.jit.trace`, `torch.export`, and the ONNX exporter on top of it) nothing branches
on a size and every size stays a tensor, so that the matrices become part of the graph, which then runs at any size.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.layers.recording import is_recording

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
    if not is_recording() and grid == native_grid:
        return pos_embed
    offsets = _offsets(offset, grid, native_grid, antialias, pos_embed.device)
    class_pos, patch_pos = pos_embed.float().split([1, pos_embed.shape[1] - 1], dim=1)
    matrix = _kept_matrix if _can_keep(pos_embed) else cubic_resize_matrix
    resize = partial(matrix, antialias=antialias, device=pos_embed.device)
    rows = resize(native_grid[0], grid[0], offset=offsets[0])  # [h, gh]
    columns = resize(native_grid[1], grid[1], offset=offsets[1])  # [w, gw]
    with _float32(pos_embed.device.type):
        resized = rows @ patch_pos.reshape(native_grid[0], -1)  # [h, gw*D]
        resized = columns @ resized.unflatten(1, (native_grid[1], -1))  # [h, w, D]
    return torch.cat([class_pos, resized.flatten(0, 1)[None]], dim=1)


def cubic_resize_matrix(
    source: int,
    target: int,
    *,
    offset: float | Tensor = 0.0,
    antialias: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """The matrix `[target, source]`, float32, that resamples a line of `source` values to `target` values."""
    float64 = _precise(device)
    position = torch.arange(target, device=device, dtype=float64)[:, None] + 0.5  # [target, 1]
    # Read off the positions and not `target`: a recorded graph would make the number a constant, or round it.
    step = source / (position.max() + 0.5 + offset)
    taps = torch.arange(source, device=device, dtype=float64)[None]  # [1, source]
    if antialias:
        width = step.clamp(min=1.0)
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


def _float32(device_type: str) -> AbstractContextManager[object]:
    """Switches autocast off, where it is on: a recorded graph would get a region of its own even for nothing."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@lru_cache(maxsize=256)
def _kept_matrix(source: int, target: int, **rule: Any) -> Tensor:
    with torch.inference_mode(False):  # the matrix may be wanted for gradients later
        return cubic_resize_matrix(source, target, **rule)


def _can_keep(pos_embed: Tensor) -> bool:
    """Whether matrices are computed at once and for real, and not recorded, compiled, captured or only pretended."""
    if is_recording() or torch.compiler.is_compiling() or type(pos_embed) not in (Tensor, nn.Parameter):
        return False
    return not pos_embed.is_meta and not (pos_embed.is_cuda and torch.cuda.is_current_stream_capturing())


def _precise(device: torch.device | None) -> torch.dtype:
    # float64: the reference derives its sampling positions from Python floats.
    return torch.float64 if device is None or device.type != "mps" else torch.float32


def _offsets(
    offset: float, grid: tuple[int, int], native_grid: tuple[int, int], antialias: bool, device: torch.device
) -> tuple[float | Tensor, float | Tensor]:
    """The offsets of both axes: 0 where an axis is not to be resampled, which the offset rule alone would move.

    That is an axis of the native size under antialiasing, and both axes at the native grid.
    """
    if not offset:
        return 0.0, 0.0
    same: list[Any]
    if is_recording():  # tensors without dimensions, so that the graph holds for both cases
        sides = [torch.ones(side, device=device, dtype=_precise(device)).sum() for side in grid]
        same = [(side == native).to(_precise(device)) for side, native in zip(sides, native_grid, strict=True)]
    else:
        same = [side == native for side, native in zip(grid, native_grid, strict=True)]
    if not antialias:
        same = [same[0] * same[1]] * 2
    return offset * (1 - same[0]), offset * (1 - same[1])


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel; zero from distance 2 on."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
