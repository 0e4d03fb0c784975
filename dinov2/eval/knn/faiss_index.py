"""The search by FAISS: its flat index, and clusters of rows for tens of millions of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.encode.tokens import require_finite
from dinov2.errors import MissingDependency

__all__ = ["search_with_faiss"]

_ROWS_AT_ONCE = 65536


def search_with_faiss(
    queries: Tensor,  # [Q, D]
    train: Tensor,  # [S, D]
    *,
    k: int,
    cosine: bool,
    clusters: bool,
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """Similarities and rows of the k nearest neighbours by FAISS on the CPU, in its order; it copies the rows.

    With `clusters` a query is compared with the rows of one cluster in sixteen alone (IVF-Flat, 4 sqrt(S) clusters):
    neighbours in other clusters are missed. Raises `MissingDependency` or, for values that are not finite, `DataError`.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("faiss-cpu", "the search with FAISS") from error

    def prepare(rows: Tensor) -> np.ndarray:
        rows = rows.detach().float().cpu()
        require_finite(rows)
        return (normalize(rows, dim=1) if cosine else rows).contiguous().numpy()

    index: Any = faiss.IndexFlatIP(train.shape[1])
    if clusters:
        n_clusters = max(1, min(int(4 * len(train) ** 0.5), len(train) // 39))  # FAISS wants 39 rows for each to learn
        index = faiss.IndexIVFFlat(index, train.shape[1], n_clusters, faiss.METRIC_INNER_PRODUCT)
        every = max(1, len(train) // (256 * n_clusters))  # more than 256 rows a cluster it would not use
        index.train(prepare(train[::every]))
        index.nprobe = max(1, n_clusters // 16)
    for first in range(0, len(train), _ROWS_AT_ONCE):
        index.add(prepare(train[first : first + _ROWS_AT_ONCE]))
    similarities, rows = index.search(prepare(queries), k)
    while clusters and (rows < 0).any():  # the clusters that were searched hold fewer than k rows
        index.nprobe = min(2 * index.nprobe, n_clusters)
        short = (rows < 0).any(axis=1)
        similarities[short], rows[short] = index.search(prepare(queries[torch.from_numpy(short)]), k)
    return torch.from_numpy(similarities), torch.from_numpy(rows)
