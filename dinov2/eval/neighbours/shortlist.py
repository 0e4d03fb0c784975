"""What may still be among the k best of each query, while training rows stream past, and the settlement in float64.

Kept are pairs (query, training row) with their score in float32. The k-th best score of a query, less what float32 can
be off by, is the level below which nothing needs to be looked at. Pairs are sorted in only when as many are new as are
old, so that the sorting costs a small part of the products. In the end every pair that may be among the k best is
computed in float64 and rounded to float32: neighbours and similarities then depend on neither the blocks nor the number
format nor the processes of the search. Of equal similarities the lower training row wins.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.eval.neighbours.scans import float32_slack

__all__ = [
    "PAIRS_AT_ONCE",
    "Pairs",
    "Shortlist",
    "best_of_block",
    "merge_neighbours",
    "products",
    "products_of_pairs",
    "where",
]

PAIRS_AT_ONCE = 1024
"""Rows that are gathered for products pair by pair; more would leave the processor's cache."""


class Pairs(NamedTuple):
    """Queries and training rows by number, with a score each: all [m]."""

    queries: Tensor
    rows: Tensor
    scores: Tensor


class Shortlist:
    """The pairs of a part of the queries that may be among the k best. Each pair is added once at most."""

    def __init__(
        self,
        queries: Tensor,  # float32 [Q, D]
        read_rows: Callable[[Tensor], Tensor],  # int64 [m] -> float32 [m, D]
        *,
        k: int,
        level: Tensor,  # float32 [Q]
    ) -> None:
        self._queries, self._read_rows, self._k = queries, read_rows, k
        self.level = level
        """float32 [Q]: no row whose similarity is certainly below is a neighbour. It only rises."""
        self._lengths = torch.linalg.vector_norm(queries, dim=1)
        self._longest = 0.0
        none = torch.empty(0, dtype=torch.int64, device=queries.device)
        self._kept = Pairs(none, none, queries.new_empty(0))
        self._new: list[Pairs] = []
        self._n_new = 0

    def slack(self, longest: float) -> Tensor:  # float32 [Q]
        """How far a float32 similarity with a training row of at most this length is off."""
        return float32_slack(self._lengths, longest, self._queries.shape[1])

    def add(self, pairs: Pairs, *, longest: float) -> None:
        """Take in pairs with rows of at most length `longest`; scores are float32 similarities or better."""
        self._longest = max(self._longest, longest)
        self._new.append(pairs)
        self._n_new += len(pairs.rows)
        if self._n_new >= max(len(self._kept.rows), len(self._queries) * self._k // 2):
            self._sort_in()

    def settled(self) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
        """The k best of each query, by similarity, then by row."""
        self._sort_in()
        best = self._settle(self._kept)
        return best.scores.view(-1, self._k), best.rows.view(-1, self._k)

    def _sort_in(self) -> None:
        pairs = _sorted(Pairs(*(torch.cat(parts) for parts in zip(self._kept, *self._new, strict=True))))
        self._new, self._n_new = [], 0
        last = _places(pairs) == self._k - 1
        slack = self.slack(self._longest)
        level = torch.full_like(self.level, -torch.inf)
        level[pairs.queries[last]] = pairs.scores[last]
        torch.maximum(self.level, level - slack, out=self.level)
        pairs = where(pairs, pairs.scores >= (self.level - slack)[pairs.queries])
        crowded = torch.bincount(pairs.queries, minlength=len(self._queries)) > 4 * self._k + 64
        if bool(crowded.any()):
            # Many rows that are equally near: float64 and their order decide already, so that they cannot pile up.
            is_crowded = crowded[pairs.queries]
            settled = self._settle(where(pairs, is_crowded))
            pairs = Pairs(*(torch.cat(parts) for parts in zip(where(pairs, ~is_crowded), settled, strict=True)))
        self._kept = pairs

    def _settle(self, pairs: Pairs) -> Pairs:
        """The k best pairs of each query, computed in float64, in the order of the queries."""
        pairs = Pairs(*(part[pairs.rows.argsort(stable=True)] for part in pairs))
        scores = torch.empty_like(pairs.scores)
        for first in range(0, len(scores), PAIRS_AT_ONCE):
            part = slice(first, first + PAIRS_AT_ONCE)
            rows = self._read_rows(pairs.rows[part])
            scores[part] = products_of_pairs(self._queries.index_select(0, pairs.queries[part]), rows)
        pairs = _sorted(Pairs(pairs.queries, pairs.rows, scores))
        return where(pairs, _places(pairs) < self._k)


def merge_neighbours(similarities: Tensor, indices: Tensor, *, k: int) -> tuple[Tensor, Tensor]:  # [Q, n] -> [Q, k]
    """The k best of candidates [Q, n]: similarity descending, then index ascending."""
    by_index = indices.argsort(dim=1, stable=True)
    similarities, indices = similarities.gather(1, by_index), indices.gather(1, by_index)
    by_similarity = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarities.gather(1, by_similarity), indices.gather(1, by_similarity)


def products(queries: Tensor, rows: Tensor) -> Tensor:  # [q, D], [b, D] -> float32 [q, b]
    """All dot products, summed in float64."""
    if queries.device.type == "mps":  # it knows no float64
        return products(queries.cpu(), rows.cpu()).to(queries.device)
    return (queries.double() @ rows.double().T).float()


def products_of_pairs(queries: Tensor, rows: Tensor) -> Tensor:  # [m, D] each -> float32 [m]
    """Dot products row by row, summed in float64."""
    if queries.device.type == "mps":
        return products_of_pairs(queries.cpu(), rows.cpu()).to(queries.device)
    return rows.double().mul_(queries).sum(dim=1).float()


def best_of_block(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:  # [q, b] -> [q, min(k, b)] each
    """The k best columns of each row and their similarities; of equal ones the lowest columns, in no special order."""
    if k >= similarities.shape[1]:
        return similarities, torch.arange(similarities.shape[1], device=similarities.device).expand_as(similarities)
    # One more than asked for shows whether a tie crosses the border; only those rows need care.
    best, columns = similarities.topk(k + 1, dim=1)
    tied = (best[:, k - 1] == best[:, k]).nonzero().squeeze(1)
    best, columns = best[:, :k], columns[:, :k]
    if len(tied):
        threshold = best[tied, k - 1 :]
        above = similarities[tied] > threshold
        equal = similarities[tied] == threshold
        chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))  # exactly k in every row
        columns[tied] = chosen.nonzero()[:, 1].view(-1, k)
        best[tied] = similarities[tied].gather(1, columns[tied])
    return best, columns


def where(pairs: Pairs, chosen: Tensor) -> Pairs:
    """The pairs that are chosen (bool [m])."""
    return Pairs(*(part[chosen] for part in pairs))


def _sorted(pairs: Pairs) -> Pairs:
    """By query, then by score descending; equal ones stay in the order in which they are."""
    # One whole number for both, which sorts several times faster than floats do. The bits of a float ascend with it,
    # but for the negative ones, whose lower bits descend; adding 0 makes -0 a 0.
    bits = (pairs.scores + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = ((pairs.queries << 32) - ascending).argsort(stable=True)
    return Pairs(*(part[order] for part in pairs))


def _places(pairs: Pairs) -> Tensor:  # int64 [m]
    """The place of each sorted pair among those of its query, from 0."""
    counts = torch.bincount(pairs.queries)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(pairs.rows), device=counts.device) - starts[pairs.queries]
