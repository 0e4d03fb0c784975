"""Stochastic depth, per sample (`drop_path`) and on a subset of the batch (`residual_on_subset`).

The subset form computes a residual branch for a random part of the batch only and scales it up, so that dropped work is
not done at all; both keep the expected value of the branch. The number of kept samples is fixed by the rate, which
keeps shapes static. (arXiv 1603.09382; the subset form: arXiv 2304.07193, section 5.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.layers.packing import PackedLayout

__all__ = ["BatchSubset", "DropPath", "draw_batch_subset", "drop_path", "residual_on_subset", "subset_size"]


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Zeroes whole samples of `[B, ...]` with probability `drop_prob`; the others are divided by `1 - drop_prob`."""
    if drop_prob == 0.0 or not training:
        return x
    keep = 1.0 - drop_prob
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * (kept / keep if keep > 0.0 else kept)


class DropPath(nn.Module):
    """`drop_path` with a fixed rate, active in training mode."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` -> `[B, ...]`."""
        return drop_path(x, self.drop_prob, self.training)


class BatchSubset(NamedTuple):
    """The samples that a residual branch is computed for."""

    rows: Tensor  # [S'] indices into the packed rows
    places: Tensor  # [S] where each packed row lies among `rows`; S' for rows that are left out
    layout: PackedLayout  # of the kept samples
    scale: float | Tensor  # batch size over kept samples; [S', 1] when the groups differ in it


def subset_size(batch: int, rate: float) -> int:
    """Samples kept of `batch`; at least one. The product is truncated in floating point, as the release does."""
    return max(int(batch * (1 - rate)), 1)


def draw_batch_subset(layout: PackedLayout, rate: float, device: torch.device) -> BatchSubset | None:
    """One random subset for each group of the layout; None when every sample is kept."""
    kept_layout = tuple((subset_size(batch, rate), length) for batch, length in layout)
    drawn, start = [], 0
    for (batch, length), (kept, _) in zip(layout, kept_layout, strict=True):
        samples = torch.randperm(batch, device=device)[:kept]
        drawn.append((start + samples[:, None] * length + torch.arange(length, device=device)).flatten())
        start += batch * length
    if kept_layout == layout:
        return None
    rows = torch.cat(drawn)
    places = torch.full((start,), len(rows), device=device)
    places[rows] = torch.arange(len(rows), device=device)
    scales = [batch / kept for (batch, _), (kept, _) in zip(layout, kept_layout, strict=True)]
    if len(set(scales)) == 1:
        return BatchSubset(rows, places, kept_layout, scales[0])
    each = [torch.full((len(part), 1), scale, device=device) for part, scale in zip(drawn, scales, strict=True)]
    return BatchSubset(rows, places, kept_layout, torch.cat(each))


def residual_on_subset(
    tokens: Tensor,  # [S, D]
    branch: Callable[[Tensor, PackedLayout], Tensor],  # rows and their layout -> rows
    layout: PackedLayout,
    rate: float,
) -> Tensor:  # [S, D]
    """`tokens` plus the branch, computed for a random subset of each group's samples and scaled by `B / kept`."""
    subset = draw_batch_subset(layout, rate, tokens.device)
    if subset is None:
        return tokens + branch(tokens, layout)
    taken: Tensor = _TakeRows.apply(tokens, subset.rows, subset.places)
    residual = branch(taken, subset.layout)
    scale = subset.scale
    if isinstance(scale, Tensor):
        residual, scale = residual * scale, 1.0
    added: Tensor = _AddRows.apply(tokens, residual.to(tokens.dtype), subset.rows, subset.places, scale)
    return added


# Both directions copy whole rows: each row is taken at most once, so the sums that PyTorch's own index_add and the
# backward of index_select prepare for (row by row on a CPU) are not needed.


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _spread(gradients[0], places), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, residual: Tensor, rows: Tensor, places: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.scale = scale
        return torch.add(tokens, _spread(residual, places), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return gradients[0], gradients[0].index_select(0, rows).mul_(ctx.scale), None, None, None


def _spread(rows: Tensor, places: Tensor) -> Tensor:
    """Rows `[S', D]` at their places among `[S, D]`, zeros elsewhere."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, places)
