"""Crops of different sizes in one run of tokens, and back.

Norms, projections and feed-forward networks do not care which image a token belongs to; only attention does. So the
tokens of all crops lie in one matrix `[S, D]`, and a *layout* remembers which rows belong together: one pair
`(batch, tokens)` a group of equally large crops. Attention runs group by group, everything else once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PackedLayout", "pack", "unpack"]

PackedLayout = tuple[tuple[int, int], ...]


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, PackedLayout]:
    """`[B_i, T_i, D]` tensors -> all tokens `[sum(B_i * T_i), D]` and their layout."""
    layout = tuple((group.shape[0], group.shape[1]) for group in groups)
    return torch.cat([group.flatten(0, 1) for group in groups]), layout


def unpack(tokens: Tensor, layout: PackedLayout) -> list[Tensor]:
    """Views `[B_i, T_i, ...]` of the packed rows `[S, ...]`, one a group."""
    rows = tokens.split([batch * length for batch, length in layout])
    return [part.unflatten(0, shape) for part, shape in zip(rows, layout, strict=True)]
