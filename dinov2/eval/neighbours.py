"""Exact nearest neighbours by dot product in float32, with bounded memory, and the soft vote of a k-NN classifier.

Training rows stream through in blocks; per query only the K best so far are kept. Of equal similarities the lower
training index wins, whatever the block sizes, because `torch.topk` alone leaves ties to chance. The search leaves any
surrounding autocast: in half precision similarities near 0.7 are multiples of 5e-4, and neighbours would tie.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.errors import DataError

__all__ = ["merge_neighbours", "nearest_neighbours", "soft_vote"]


def nearest_neighbours(
    queries: Tensor,  # [Q, D]
    train: Tensor,  # [S, D]
    *,
    k: int,
    cosine: bool = False,
    exclude: Tensor | None = None,  # int64 [Q]
    device: torch.device | str | None = None,
    query_block: int = 256,
    train_block: int = 16384,
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """Similarities, descending, and training rows of the k nearest neighbours of each query, on the CPU.

    Args:
        k: number of neighbours, at most the number of training rows.
        cosine: divide both sides by their L2 norms first (block by block, so nothing is copied as a whole).
        exclude: one training row per query that is no neighbour of it, such as the query itself.
        device: where to search; None means where `queries` are. Training rows travel there block by block, once.

    Memory beyond the queries: `query_block * train_block` similarities and `Q * k` results.

    Raises:
        DataError: there are fewer than k neighbours to find, widths differ, or a value is not finite.
    """
    device = queries.device if device is None else torch.device(device)
    available = len(train) - (exclude is not None)
    if not 1 <= k <= available:
        raise DataError(f"{k} neighbours were asked for, but there are {max(0, available)} to choose from")
    if queries.ndim != 2 or train.ndim != 2 or queries.shape[1] != train.shape[1]:
        raise DataError(
            f"queries {list(queries.shape)} and training features {list(train.shape)} must have the same width; "
            "extract both with the same model"
        )
    best_similarities = torch.empty(len(queries), 0)
    best_indices = torch.empty(len(queries), 0, dtype=torch.int64)
    with torch.no_grad(), _full_float32(device):
        blocks = [_prepared(block, device, cosine) for block in queries.split(query_block)]
        for first in range(0, len(train), train_block):
            train_rows = _prepared(train[first : first + train_block], device, cosine)
            found = [
                _search_block(
                    block, train_rows, k, first, None if exclude is None else exclude[i * query_block :][: len(block)]
                )
                for i, block in enumerate(blocks)
            ]
            similarities, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
            best_similarities, best_indices = merge_neighbours(
                torch.cat([best_similarities, similarities], dim=1), torch.cat([best_indices, indices], dim=1), k=k
            )
    return best_similarities, best_indices


def merge_neighbours(similarities: Tensor, indices: Tensor, *, k: int) -> tuple[Tensor, Tensor]:  # [Q, n] -> [Q, k]
    """The k best of candidates [Q, n]: similarity descending, then index ascending."""
    by_index = indices.argsort(dim=1, stable=True)
    similarities, indices = similarities.gather(1, by_index), indices.gather(1, by_index)
    by_similarity = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarities.gather(1, by_similarity), indices.gather(1, by_similarity)


def soft_vote(
    similarities: Tensor,  # [Q, K], descending
    neighbour_labels: Tensor,  # int64 [Q, K], in 0 .. n_classes - 1
    *,
    n_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, Tensor]:  # k -> [Q, C]
    """Class scores of the k nearest neighbours for each k of `ks`, all from one sorted list.

    A neighbour weighs softmax(similarity / temperature) over all K neighbours, so scores of the largest k sum to 1 and
    those of a smaller k to less; their order is that of a vote among the k nearest alone.
    Paper: Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination".
    """
    weights = (similarities / temperature).softmax(dim=1)
    scores = weights.new_zeros(len(weights), n_classes)
    votes, counted = {}, 0
    for k in sorted(set(ks)):
        scores = scores.scatter_add(1, neighbour_labels[:, counted:k], weights[:, counted:k])
        votes[k], counted = scores, k
    return votes


def _search_block(
    queries: Tensor, train_rows: Tensor, k: int, first: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best of one training block, whose first row has index `first`: [q, min(k, b)] each, on the CPU."""
    similarities = queries @ train_rows.T  # [q, b]
    if exclude is not None:
        column = exclude.to(queries.device) - first
        inside = ((column >= 0) & (column < len(train_rows))).nonzero().squeeze(1)
        similarities[inside, column[inside]] = -torch.inf
    k = min(k, len(train_rows))
    if k == len(train_rows):
        best, columns = similarities, torch.arange(k, device=queries.device).expand(len(queries), k)
    else:
        # One more than asked for shows whether a tie crosses the border; only those rows need care.
        best, columns = similarities.topk(k + 1, dim=1)
        tied = (best[:, k - 1] == best[:, k]).nonzero().squeeze(1)
        best, columns = best[:, :k], columns[:, :k]
        if len(tied):
            lowest = _lowest_columns_of_ties(similarities[tied], best[tied, k - 1], k)
            columns[tied], best[tied] = lowest, similarities[tied].gather(1, lowest)
    best, columns = merge_neighbours(best, columns, k=k)
    return best.cpu(), columns.cpu() + first


def _lowest_columns_of_ties(similarities: Tensor, threshold: Tensor, k: int) -> Tensor:  # [q, b], [q] -> int64 [q, k]
    """Columns above the threshold, filled up to k with the lowest ones that equal it."""
    above = similarities > threshold.unsqueeze(1)
    equal = similarities == threshold.unsqueeze(1)
    missing = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= missing))  # exactly k in every row
    return chosen.nonzero()[:, 1].view(-1, k)


def _prepared(rows: Tensor, device: torch.device, cosine: bool) -> Tensor:
    rows = rows.to(device).float()
    if not bool(rows.isfinite().all()):
        raise DataError("the features hold NaN or infinite values; look at the training log, the model has diverged")
    return normalize(rows, dim=1) if cosine else rows


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bfloat16 inside float32 products, whatever the training around has switched on."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
