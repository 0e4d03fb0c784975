"""Pairs of rows that are nearly the same, block by block, and the groups that they make.

Rows are compared in blocks of the upper triangle, so memory is that of one block of similarities and of the pairs that
were found, whatever the number of rows; the time grows with its square.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.encode.tokens import require_finite
from dinov2.errors import DataError

__all__ = ["groups_of_pairs", "similar_pairs"]


def similar_pairs(
    features: Tensor,  # [S, D]
    *,
    threshold: float,
    block: int = 4096,
    most: int = 1_000_000,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:  # int64 [P, 2], float32 [P]
    """Pairs of rows (i < j) whose cosine similarity is at least `threshold`, and that similarity, most similar first.

    Similarities are products in float32; equal ones keep the order of the rows. `progress` is called with (rows done,
    rows in all).

    Raises:
        DataError: there are more than `most` pairs (the threshold is too low to mean anything), or a value is not
            finite.
    """
    require_finite(features)
    rows = normalize(features.float(), dim=1)
    pairs: list[Tensor] = []
    similarities: list[Tensor] = []
    found = 0
    for top in range(0, len(rows), block):
        queries = rows[top : top + block].to(device)
        for left in range(top, len(rows), block):
            products = queries @ rows[left : left + block].to(device).T
            if left == top:
                products = products.masked_fill(torch.ones_like(products, dtype=torch.bool).tril(), -torch.inf)
            near = (products >= threshold).nonzero()  # [p, 2]
            found += len(near)
            if found > most:
                raise DataError(
                    f"more than {most:,} pairs of images are at least {threshold} similar; give a higher threshold"
                )
            if len(near):
                similarities.append(products[near[:, 0], near[:, 1]].cpu())
                pairs.append((near + torch.tensor([top, left], device=near.device)).cpu())
        if progress is not None:
            progress(min(top + block, len(rows)), len(rows))
    if not pairs:
        return torch.empty(0, 2, dtype=torch.int64), torch.empty(0)
    all_pairs, values = torch.cat(pairs), torch.cat(similarities)
    by_rows = (all_pairs[:, 0] * len(rows) + all_pairs[:, 1]).argsort()
    all_pairs, values = all_pairs[by_rows], values[by_rows]
    order = values.argsort(descending=True, stable=True)
    return all_pairs[order], values[order]


def groups_of_pairs(pairs: Tensor) -> list[list[int]]:
    """Rows that hang together by pairs int64 [P, 2], each group in ascending order, the largest group first."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in pairs.tolist():
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for row in sorted(parent):
        groups.setdefault(root(row), []).append(row)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))
