"""The search by FAISS, for those who have it: its flat index, and clusters of rows for tens of millions of them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.encode.tokens import require_finite
from dinov2.errors import MissingDependency
from dinov2.eval.neighbours.shortlist import merge_neighbours

__all__ = ["search_with_faiss"]

_ROWS_AT_ONCE = 65536


def search_with_faiss(
    queries: Tensor,  # [Q, D]
    train: Tensor,  # [S, D]
    *,
    k: int,
    cosine: bool,
    exclude: Tensor | None,  # int64 [Q]
    clusters: bool,
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """The k nearest neighbours by FAISS on the CPU, of equal similarities the lower row first among those it found.

    FAISS copies the training rows. With `clusters` it compares a query with the rows of one cluster in sixteen alone
    (IVF-Flat, 4 sqrt(S) clusters): neighbours in other clusters are missed, so the result is approximate; how good it
    is shows in a comparison of some queries with the exact search.

    Raises:
        MissingDependency: FAISS is not installed.
        DataError: a value is not finite.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("faiss-cpu", "the search with FAISS") from error
    width = train.shape[1]
    index: Any = faiss.IndexFlatIP(width)
    if clusters:
        n_clusters = max(1, min(int(4 * len(train) ** 0.5), len(train) // 39))  # FAISS wants 39 rows for each to learn
        index = faiss.IndexIVFFlat(index, width, n_clusters, faiss.METRIC_INNER_PRODUCT)
        every = max(1, len(train) // (256 * n_clusters))  # more than 256 rows a cluster it would not use
        index.train(_rows(train[::every], cosine))
        index.nprobe = max(1, n_clusters // 16)
    for first in range(0, len(train), _ROWS_AT_ONCE):
        index.add(_rows(train[first : first + _ROWS_AT_ONCE], cosine))
    asked = k + (exclude is not None)
    found, numbers = index.search(_rows(queries, cosine), asked)
    while clusters and (numbers < 0).any():  # fewer rows than asked for in the clusters that were looked into
        index.nprobe = min(2 * index.nprobe, n_clusters)
        short = (numbers < 0).any(axis=1)
        found[short], numbers[short] = index.search(_rows(queries[torch.from_numpy(short)], cosine), asked)
    similarities, indices = torch.from_numpy(found), torch.from_numpy(numbers)
    if exclude is not None:
        similarities[indices == exclude.cpu().unsqueeze(1)] = -torch.inf
    return merge_neighbours(similarities, indices, k=k)


def _rows(rows: Tensor, cosine: bool) -> Any:
    rows = rows.detach().float().cpu()
    require_finite(rows)
    return (normalize(rows, dim=1) if cosine else rows).contiguous().numpy()
