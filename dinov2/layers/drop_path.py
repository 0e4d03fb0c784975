"""Stochastic depth, per sample (`drop_path`) and on a subset of the batch (`residual_on_subset`).

The subset form computes a residual branch for a random part of the batch only and scales it up, so that dropped work is
not done at all; both keep the expected value of the branch. The number of kept samples is fixed by the rate, which
keeps shapes static. (arXiv 1603.09382; the subset form: arXiv 2304.07193, section 5.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2.layers.packing import Layout

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
    layout: Layout  # of the kept samples
    scale: Tensor  # [S', 1] batch size over kept samples, of the row's group


def subset_size(batch: int, rate: float) -> int:
    """Samples kept of `batch`; at least one. The product is truncated in floating point, as the release does."""
    return max(int(batch * (1 - rate)), 1)


def draw_batch_subset(layout: Layout, rate: float, device: torch.device) -> BatchSubset | None:
    """One random subset for each group of the layout; None when every sample is kept."""
    rows, kept_layout, scales, start = [], [], [], 0
    for batch, length in layout:
        kept = subset_size(batch, rate)
        samples = torch.randperm(batch, device=device)[:kept]
        rows.append((start + samples[:, None] * length + torch.arange(length, device=device)).flatten())
        scales.append(torch.full((kept * length, 1), batch / kept, device=device))
        kept_layout.append((kept, length))
        start += batch * length
    if tuple(kept_layout) == layout:
        return None
    return BatchSubset(torch.cat(rows), tuple(kept_layout), torch.cat(scales))


def residual_on_subset(
    tokens: Tensor,  # [S, D]
    branch: Callable[[Tensor, Layout], Tensor],  # rows and their layout -> rows
    layout: Layout,
    rate: float,
) -> Tensor:  # [S, D]
    """`tokens` plus the branch, computed for a random subset of each group's samples and scaled by `B / kept`."""
    subset = draw_batch_subset(layout, rate, tokens.device)
    if subset is None:
        return tokens + branch(tokens, layout)
    residual = branch(tokens.index_select(0, subset.rows), subset.layout) * subset.scale
    return tokens.index_add(0, subset.rows, residual.to(tokens.dtype))
