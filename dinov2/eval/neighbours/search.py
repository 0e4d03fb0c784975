"""The search: blocks of training rows stream past the queries, and hardly anything but products is computed.

The full matrix of similarities never exists. Of each block of scores only the largest of every group of rows is
compared with the query's level (`shortlist.py`), which a sample of the training rows sets before the search begins, so
that the order of the training set does not matter. Where a group has something to offer, its rows are looked at one by
one.

Similarities are those of float32 rows, summed in float64 and rounded to float32, whatever number format the scan uses
and whatever blocks, processes or devices there are; of equal ones the lower training row wins. The search leaves any
surrounding autocast and any setting that makes float32 products cheaper.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError
from dinov2.eval.neighbours.faiss_index import search_with_faiss
from dinov2.eval.neighbours.scans import GROUP, SCANS, Scan, fastest_scan, float32_slack, groups_of
from dinov2.eval.neighbours.shortlist import PAIRS_AT_ONCE, Pairs, Shortlist, best_of_block, products, where

__all__ = ["nearest_neighbours"]

_LARGEST_SAMPLE = 8192
_SMALLEST_REDUCED_SCAN = 2e11  # multiplications; below, rounding the rows takes longer than it saves
_COST_OF_A_DOUBT = 600  # twice the products that a faster scan must save to make up for a pair that it leaves in doubt
_BACKENDS = ("torch", "faiss", "faiss-ivf")
_ON_A_GPU = 4096  # queries that are multiplied at once
_PAIRS_A_PASS = 2_000_000  # queries x k whose neighbours are searched together


def nearest_neighbours(
    queries: Tensor,  # [Q, D]
    train: Tensor,  # [S, D]
    *,
    k: int,
    cosine: bool = False,
    exclude: Tensor | None = None,  # int64 [Q]
    device: torch.device | str | None = None,
    query_block: int | None = None,
    train_block: int | None = None,
    scan: str = "auto",
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """Similarities, descending, and training rows of the k nearest neighbours of each query, on the CPU.

    Args:
        k: number of neighbours, at most the number of training rows.
        cosine: divide both sides by their L2 norms first (block by block, so nothing is copied as a whole).
        exclude: one training row per query that is no neighbour of it, such as the query itself; -1 for none.
        device: where to search; None means where `queries` are. Training rows travel there block by block.
        query_block, train_block: rows that are multiplied at once; None takes what suits the device.
        scan: number format of the products that decide which rows are computed exactly: `float32`, `bfloat16`, `int8`,
            or `auto` for the fastest one here. The result is the same with each.
        backend: `torch`, or FAISS (`pip install faiss-cpu`): `faiss` (all rows, in float32, ties as they fall) or
            `faiss-ivf`, which looks into some clusters of the training rows only: approximate, for tens of millions.

    Memory beyond the queries: one block of rows and of similarities, and some `Q * k` pairs.

    Raises:
        DataError: there are fewer than k neighbours to find, widths differ, or a value is not finite.
        ConfigError: there is no such scan or backend.
        MissingDependency: FAISS is not installed.
    """
    device = queries.device if device is None else torch.device(device)
    _check(queries, train, k, exclude, scan, backend)
    exclude = None if exclude is None else exclude.to(device)
    if backend != "torch":
        return search_with_faiss(queries, train, k=k, cosine=cosine, exclude=exclude, clusters=backend == "faiss-ivf")
    train_block = train_block or (4096 if device.type == "cpu" else 16384)
    similarities = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    at_once = max(_PAIRS_A_PASS // k, query_block or _ON_A_GPU)
    with torch.no_grad(), _full_float32(device):
        for first in range(0, len(queries), at_once):
            part = slice(first, first + at_once)
            own_exclude = None if exclude is None else exclude[part]
            search = _Search(_prepared(queries[part], device, cosine), train, k, cosine, own_exclude, query_block)
            found = search.run(scan, train_block)
            similarities[part], indices[part] = found
    return similarities, indices


class _Search:
    """One stream of the training rows past a part of the queries."""

    def __init__(
        self, queries: Tensor, train: Tensor, k: int, cosine: bool, exclude: Tensor | None, query_block: int | None
    ) -> None:
        self.queries, self.train, self.k, self.cosine, self.exclude = queries, train, k, cosine, exclude
        self.device, self.wanted_block = queries.device, query_block
        self.query_block = query_block or (512 if self.device.type == "cpu" else _ON_A_GPU)

    def run(self, scan_name: str, train_block: int) -> tuple[Tensor, Tensor]:  # [Q, k] each
        """The neighbours of these queries."""
        sample = self._sample()
        shortlist = Shortlist(self.queries, self._rows, k=self.k, level=self._level_of(sample))
        scan = SCANS[self._chosen(sample, shortlist.level) if scan_name == "auto" else scan_name]
        del sample
        if self.wanted_block is None and self.device.type == "cpu":
            self.query_block = scan.queries_at_once
        queries = scan.round_queries(self.queries)
        longest_query = float(queries.length.max()) if len(self.queries) else 0.0
        # Products are written to the same memory: fresh memory for each would cost as much as looking at them.
        memory = torch.empty(min(self.query_block, len(self.queries)) * train_block, device=self.device)
        for first in range(0, len(self.train), train_block):
            rows = _prepared(self.train[first : first + train_block], self.device, self.cosine)
            rounded = scan.round_train(rows)
            group_length = groups_of(rounded.length, 0.0).amax(dim=1)
            group_error = groups_of(rounded.error, 0.0).amax(dim=1)
            longest = float(group_length.max())
            _require_products(longest, longest_query)
            # The level may rise while the block is searched, and the cut may lag behind: both are on the safe side.
            cut = scan.cut(shortlist.level, queries, group_length, group_error)  # [Q, g]
            for top in range(0, len(self.queries), self.query_block):
                block = queries.part(top, self.query_block)
                n = len(block.values)
                scores = scan.product(block, rounded, memory[: n * len(rows)].view(n, len(rows)))
                pairs = _above(scores, cut[top : top + n])
                if pairs is None or not len(pairs.rows):
                    continue
                if len(pairs.rows) > scores.numel() // 4 and len(rows) > GROUP:
                    # So many rows are equally near that they are no choice: settle them within the block.
                    pairs = self._best_of_all(rows, top, n, first)
                else:
                    pairs = self._checked(pairs, rows, top, first, scan, shortlist, longest)
                shortlist.add(pairs, longest=longest)
        return shortlist.settled()

    def _rows(self, numbers: Tensor) -> Tensor:  # int64 [m] -> float32 [m, D]
        return _prepared(self.train.index_select(0, numbers.to(self.train.device)), self.device, self.cosine)

    def _sample(self) -> Tensor:  # float32 [n, D]
        """Training rows at equal distances: more than k, few enough to cost nothing."""
        n = min(len(self.train), max(16 * self.k, 256, min(_LARGEST_SAMPLE, len(self.train) // 64)))
        return self._rows(torch.arange(n) * len(self.train) // n)

    def _level_of(self, sample: Tensor) -> Tensor:  # float32 [Q]
        """What the k-th best of the sample is at least; that of all training rows is no less."""
        longest = float(torch.linalg.vector_norm(sample, dim=1).max())
        level = self.queries.new_empty(len(self.queries))
        k = self.k + (self.exclude is not None)  # the excluded row may be among them
        for first in range(0, len(level), self.query_block):
            block = self.queries[first : first + self.query_block]
            level[first : first + self.query_block] = (block @ sample.T).topk(k, dim=1)[0][:, -1]
        return level - float32_slack(torch.linalg.vector_norm(self.queries, dim=1), longest, sample.shape[1])

    def _chosen(self, sample: Tensor, level: Tensor) -> str:
        """The fastest scan, unless its rounding hides so much that computing again costs more than it saves."""
        name = fastest_scan(self.device)
        if name == "float32" or len(self.queries) * len(self.train) * sample.shape[1] < _SMALLEST_REDUCED_SCAN:
            return "float32"
        scan = SCANS[name]
        block, rounded = scan.round_queries(self.queries[: self.query_block]), scan.round_train(sample)
        lengths, errors = (groups_of(part, 0.0).amax(dim=1) for part in (rounded.length, rounded.error))
        cut = scan.cut(level[: self.query_block], block, lengths, errors)
        memory = torch.empty(len(block.values), len(sample), device=self.device)
        pairs = _above(scan.product(block, rounded, memory), cut)
        in_sample = 0 if pairs is None else len(pairs.rows) / len(block.values)
        # While the level rises, each doubling of the rows that were seen brings about as many again.
        doubts = in_sample * (1 + math.log(len(self.train) / len(sample)))
        return name if doubts * _COST_OF_A_DOUBT < len(self.train) else "float32"

    def _best_of_all(self, rows: Tensor, top: int, n: int, first: int) -> Pairs:
        """The k best rows of a block for each of n queries, in float64."""
        queries = self.queries[top : top + n]
        similarities = products(queries, rows)  # [q, b]
        columns = torch.arange(first, first + len(rows), device=self.device)
        if self.exclude is not None:
            similarities[self.exclude[top : top + n].unsqueeze(1) == columns] = -torch.inf
        best, column = best_of_block(similarities, self.k)
        query = torch.arange(top, top + n, device=self.device).unsqueeze(1).expand_as(column)
        pairs = Pairs(query.flatten(), column.flatten() + first, best.flatten())
        return where(pairs, pairs.scores > -torch.inf)

    def _checked(
        self, pairs: Pairs, rows: Tensor, top: int, first: int, scan: Scan, shortlist: Shortlist, longest: float
    ) -> Pairs:
        """Pairs of a block by their numbers in the whole and with scores in float32, without those that are no good."""
        if scan.name == "float32":
            pairs = Pairs(pairs.queries + top, pairs.rows + first, pairs.scores)
        else:
            scores = torch.empty(len(pairs.rows), device=self.device)
            queries = self.queries[top : top + self.query_block]
            for part in torch.arange(len(scores), device=self.device).split(PAIRS_AT_ONCE):
                own = queries.index_select(0, pairs.queries[part])
                scores[part] = own.mul_(rows.index_select(0, pairs.rows[part])).sum(dim=1)
            pairs = Pairs(pairs.queries + top, pairs.rows + first, scores)
            pairs = where(pairs, scores >= (shortlist.level - shortlist.slack(longest))[pairs.queries])
        if self.exclude is not None:
            pairs = where(pairs, self.exclude[pairs.queries] != pairs.rows)
        return pairs


def _above(scores: Tensor, cut: Tensor) -> Pairs | None:  # [q, b], [q, g]
    """Pairs (row, column) of the scores that reach the cut of their group."""
    grouped = groups_of(scores, -torch.inf)  # [q, g, GROUP]
    query, group = (grouped.amax(dim=2) >= cut).nonzero(as_tuple=True)
    if not len(query):
        return None
    # Whole groups are copied, which is far quicker than to pick single values.
    number = query * grouped.shape[1] + group
    values = grouped.flatten(0, 1).index_select(0, number)  # [h, GROUP]
    hit, within = (values >= cut.flatten()[number].unsqueeze(1)).nonzero(as_tuple=True)
    return Pairs(query[hit], group[hit] * GROUP + within, values[hit, within].float())


def _check(queries: Tensor, train: Tensor, k: int, exclude: Tensor | None, scan: str, backend: str) -> None:
    available = max(0, len(train) - (exclude is not None))
    if not 1 <= k <= available:
        raise DataError(f"{k} neighbours were asked for, but there are {available} to choose from")
    if queries.ndim != 2 or train.ndim != 2 or queries.shape[1] != train.shape[1]:
        raise DataError(
            f"queries {list(queries.shape)} and training features {list(train.shape)} must have the same width; "
            "extract both with the same model"
        )
    if scan != "auto" and scan not in SCANS:
        raise ConfigError(f"no scan is called {scan!r}; choose auto, {', '.join(SCANS)}")
    if backend not in _BACKENDS:
        raise ConfigError(f"no search backend is called {backend!r}; choose {', '.join(_BACKENDS)}")


def _prepared(rows: Tensor, device: torch.device, cosine: bool) -> Tensor:
    rows = rows.to(device).float()
    require_finite(rows)
    return normalize(rows, dim=1) if cosine else rows


def _require_products(longest: float, longest_query: float) -> None:
    if not longest * longest_query < 2.0**120:
        raise DataError(
            f"the longest rows are {longest:.1e} and {longest_query:.1e} long, and their products overflow; "
            "search by cosine, or divide the features by a number"
        )


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bfloat16 inside float32 products, whatever the training around has switched on."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        # Else sums of bfloat16 products may be added up in bfloat16, which the scan's bound knows nothing of.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
