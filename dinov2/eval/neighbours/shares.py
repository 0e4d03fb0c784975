"""A search over several processes, which share out the queries or the training rows. With one process, both are the
plain search.

The result is that of one process: similarities do not depend on who computed them.
"""

from typing import Any

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.eval.neighbours.search import nearest_neighbours
from dinov2.eval.neighbours.shortlist import merge_neighbours

__all__ = ["neighbours_of_own_queries", "neighbours_of_shared_rows", "own_share"]


def own_share(n: int) -> slice:
    """This process's share of n rows, such that all shares in rank order are all rows; some are longer by one."""
    rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def neighbours_of_own_queries(
    queries: Tensor,  # [Q, D]
    train: Tensor,  # [S, D]
    *,
    k: int,
    exclude: Tensor | None = None,  # int64 [Q]
    **options: Any,
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """`nearest_neighbours` where every process has all rows and searches for its share of the queries.

    All processes call with the same arguments and get all results.
    """
    own = own_share(len(queries))
    found = nearest_neighbours(queries[own], train, k=k, exclude=None if exclude is None else exclude[own], **options)
    similarities, indices = (distributed.all_gather_rows(part) for part in found)
    return similarities, indices


def neighbours_of_shared_rows(
    queries: Tensor,  # [Q_rank, D]
    own_rows: Tensor,  # [S_rank, D]
    *,
    k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # float32 [Q_rank, k], int64 [Q_rank, k]
    """`nearest_neighbours` where every process has a part of the training rows and queries of its own (none is fine).

    Queries travel to all processes, and the best of each part back. Rows are numbered through in rank order.
    """
    rank = distributed.get_global_rank()
    n_rows, n_queries = distributed.all_gather_rows(torch.tensor([[len(own_rows), len(queries)]])).unbind(dim=1)
    first_row, first_query = int(n_rows[:rank].sum()), int(n_queries[:rank].sum())
    everyone = distributed.all_gather_rows(queries.detach().float().cpu())
    # A small part holds fewer than k rows; what is missing can never be among the best.
    similarities = torch.full((len(everyone), k), -torch.inf)
    indices = torch.full((len(everyone), k), int(n_rows.sum()))
    own_k = k if distributed.get_global_size() == 1 else min(k, len(own_rows))
    if own_k > 0:
        found, rows = nearest_neighbours(everyone, own_rows, k=own_k, **options)
        similarities[:, :own_k], indices[:, :own_k] = found, rows + first_row
    parts = (
        torch.cat(distributed.all_gather_rows(part).split(max(1, len(everyone))), dim=1)  # [Q, W * k]
        for part in (similarities, indices)
    )
    similarities, indices = merge_neighbours(*parts, k=k)
    own = slice(first_query, first_query + len(queries))
    return similarities[own], indices[own]
