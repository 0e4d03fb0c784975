"""Exact nearest neighbours by dot product, with bounded memory.

Blocks of training rows stream past the queries, so that the full matrix of similarities never exists. Products are
computed in float32 or bfloat16 (`QuantisedProduct`) and decide only which pairs are looked at again: of each block the
largest score of every group of rows is compared with a threshold, below which the error bound of the product leaves no
neighbour. A sample of the training rows sets the first threshold, so that their order does not matter.
Candidates are kept with their score in float32 (`_Candidates`); those that may be among the k best are computed in
float64 and rounded to float32 in the end. Neighbours and similarities then depend on neither the number format nor the
blocks, processes or devices of the search; of equal similarities the lower training row wins.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from dinov2.encode.tokens import require_finite
from dinov2.engine.parallel import choose_precision
from dinov2.errors import ConfigError, DataError
from dinov2.layers.kernels import fast_linear, onednn_is_faster

__all__ = ["PRODUCTS", "QuantisedProduct", "SearchBackend", "merge_neighbours", "nearest_neighbours"]

_GROUP = 64
"""Training rows whose largest score is compared first."""

SearchBackend = Literal["torch", "faiss", "faiss-ivf"]

_LARGEST_SAMPLE = 8192
_SMALLEST_BFLOAT16_SEARCH = 2e11  # multiplications; below, rounding the rows takes longer than it saves
_COST_OF_A_CANDIDATE = 600  # twice the products that bfloat16 must save to make up for a pair that it leaves in doubt
_QUERIES_ON_A_GPU = 4096  # multiplied at once
_PAIRS_A_PASS = 2_000_000  # queries x k whose neighbours are searched together
_PAIRS_AT_ONCE = 1024  # gathered for products pair by pair; more would leave the processor's cache


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
    product: str = "auto",
    backend: SearchBackend = "torch",
) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
    """Similarities, descending, and training rows of the k nearest neighbours of each query, on the CPU.

    Args:
        k: number of neighbours, at most the number of training rows.
        cosine: divide both sides by their L2 norms first (block by block, so nothing is copied as a whole).
        exclude: one training row per query that is no neighbour of it, such as the query itself; -1 for none.
        device: where to search; None means where `queries` are. Training rows travel there block by block.
        query_block, train_block: rows that are multiplied at once; None takes what suits the device.
        product: number format of the products that select candidates: `float32`, `bfloat16`, or `auto` for the faster
            one here. The result is the same with each.
        backend: `torch`, or FAISS (`pip install faiss-cpu`): `faiss` (all rows, in float32, ties as they fall) or
            `faiss-ivf`, which looks into some clusters of the training rows only: approximate, for tens of millions.

    Memory beyond the queries: one block of rows and of similarities, and some `Q * k` pairs.

    Raises:
        DataError: there are fewer than k neighbours to find, widths differ, or a value is not finite.
        ConfigError: there is no such product or backend.
        MissingDependency: FAISS is not installed.
    """
    device = queries.device if device is None else torch.device(device)
    _check(queries, train, k, exclude, product, backend)
    exclude = None if exclude is None else exclude.to(device)
    if backend != "torch":
        from dinov2.eval.knn.faiss_index import search_with_faiss

        one_more = k + (exclude is not None)
        similarities, indices = search_with_faiss(
            queries, train, k=one_more, cosine=cosine, clusters=backend == "faiss-ivf"
        )
        if exclude is not None:
            similarities[indices == exclude.cpu().unsqueeze(1)] = -torch.inf
        return merge_neighbours(similarities, indices, k=k)
    train_block = train_block or (4096 if device.type == "cpu" else 16384)
    similarities, indices = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    queries_a_pass = max(_PAIRS_A_PASS // k, query_block or _QUERIES_ON_A_GPU)
    with torch.no_grad(), _full_float32(device):
        for first in range(0, len(queries), queries_a_pass):
            part = slice(first, first + queries_a_pass)
            rows = _prepare(queries[part], device, cosine)
            search = _Search(rows, train, k, cosine, None if exclude is None else exclude[part], query_block)
            similarities[part], indices[part] = search.run(product, train_block)
    return similarities, indices


class _QuantisedRows(NamedTuple):
    values: Tensor  # [n, D] in the number format of the product
    length: Tensor  # float32 [n]: length of the rows before rounding
    error: Tensor  # float32 [n]: length of the difference that rounding made


@dataclass(frozen=True)
class QuantisedProduct:
    """Dot products in float32 or bfloat16, with a bound on their error.

    Write q' and t' for rows as they are rounded, e_q = q - q' and e_t = t - t'. By the inequality of Cauchy and Schwarz
    |q.t - q'.t'| <= |e_q||t| + |q'||e_t|, where all four lengths are measured, not assumed. Adding up D products in
    float32, in whatever order and with or without fused steps, is off by at most g |q'||t'| with g = D u / (1 - D u),
    u = 2^-24 (Higham, "Accuracy and stability of numerical algorithms", section 3.1). A product that is stored in
    bfloat16 is off by another 2^-8 of itself.
    """

    dtype: torch.dtype
    queries_at_once: int
    """Multiplied with a block of training rows on a CPU (benchmarks/knn.py). bfloat16 makes fresh memory for each
    product and wants small ones; float32 writes to the same memory again."""

    def quantise(self, rows: Tensor) -> _QuantisedRows:  # float32 [n, D]
        """Round rows and measure what that costs."""
        length = torch.linalg.vector_norm(rows, dim=1)
        if self.dtype is torch.float32:
            return _QuantisedRows(rows, length, torch.zeros_like(length))
        values = rows.to(self.dtype)
        return _QuantisedRows(values, length, torch.linalg.vector_norm(rows - values.float(), dim=1))

    def __call__(self, queries: Tensor, train: Tensor, out: Tensor) -> Tensor:  # [q, D], [b, D] -> [q, b]
        """Products of quantised rows, in `out` where that is quicker."""
        if self.dtype is not torch.float32:
            return torch.mm(queries, train.T)
        if queries.device.type == "cpu" and onednn_is_faster():
            return fast_linear(queries, train, None)
        return torch.mm(queries, train.T, out=out)

    def threshold(
        self, lower_bound: Tensor, queries: _QuantisedRows, group_length: Tensor, group_error: Tensor
    ) -> Tensor:
        """Least score of a row whose similarity is at least `lower_bound`: [q] and groups of rows [g] -> [q, g].

        Groups are given by the largest length and error of their rows.
        """
        bound = _summation_bound(queries.values.shape[-1])
        rounded_length = queries.length + queries.error  # at least |q'|
        slopes = torch.stack([queries.error + bound * rounded_length, (1 + bound) * rounded_length])  # [2, q]
        slopes *= 1 + 2 * bound + 2**-20  # all of this is rounded itself
        lower_bound = lower_bound - lower_bound.abs() * 2**-20
        least = torch.addmm(lower_bound.unsqueeze(1), slopes.T, torch.stack([group_length, group_error]), alpha=-1)
        if self.dtype is not torch.float32:
            least = least / torch.where(least > 0, 1 + 2.0**-8, 1 - 2.0**-8)
            least -= least.abs() * 2**-20
        return least


PRODUCTS = {
    "float32": QuantisedProduct(torch.float32, queries_at_once=2048),
    "bfloat16": QuantisedProduct(torch.bfloat16, queries_at_once=512),
}
"""Products by name."""


class _Pairs(NamedTuple):
    """Queries and training rows by number, with a score each: all [m]."""

    queries: Tensor
    rows: Tensor
    scores: Tensor

    def select(self, chosen: Tensor) -> "_Pairs":  # bool or int64
        return _Pairs(*(column[chosen] for column in self))


class _Search:
    """One stream of the training rows past a part of the queries."""

    def __init__(
        self, queries: Tensor, train: Tensor, k: int, cosine: bool, exclude: Tensor | None, query_block: int | None
    ) -> None:
        self.queries, self.train, self.k, self.cosine, self.exclude = queries, train, k, cosine, exclude
        self.device, self.given_block = queries.device, query_block
        self.query_block = query_block or (512 if self.device.type == "cpu" else _QUERIES_ON_A_GPU)

    def run(self, product_name: str, train_block: int) -> tuple[Tensor, Tensor]:  # [Q, k] each
        """The neighbours of these queries."""
        sample = self._sample()
        candidates = _Candidates(self.queries, self._rows, k=self.k, lower_bound=self._lower_bound(sample))
        chosen = self._fastest(sample, candidates.kth_best_lower_bound) if product_name == "auto" else product_name
        del sample
        product = PRODUCTS[chosen]
        if self.given_block is None and self.device.type == "cpu":
            self.query_block = product.queries_at_once
        queries = product.quantise(self.queries)
        longest_query = float(queries.length.max()) if len(self.queries) else 0.0
        # Products are written to the same memory: fresh memory for each would cost as much as looking at them.
        memory = torch.empty(min(self.query_block, len(self.queries)) * train_block, device=self.device)
        for first in range(0, len(self.train), train_block):
            rows = _prepare(self.train[first : first + train_block], self.device, self.cosine)
            quantised = product.quantise(rows)
            group_length, group_error = (_grouped(part, 0.0).amax(dim=1) for part in quantised[1:])
            longest = float(group_length.max())
            if not longest * longest_query < 2.0**120:
                raise DataError(
                    f"the longest rows are {longest:.1e} and {longest_query:.1e} long, and their products overflow; "
                    "search by cosine, or divide the features by a number"
                )
            # The bound may rise while the block is searched, and the threshold may lag behind: both are safe.
            threshold = product.threshold(candidates.kth_best_lower_bound, queries, group_length, group_error)  # [Q, g]
            for top in range(0, len(self.queries), self.query_block):
                block = queries.values[top : top + self.query_block]
                scores = product(block, quantised.values, memory[: len(block) * len(rows)].view(len(block), len(rows)))
                pairs = _above(scores, threshold[top : top + len(block)])
                if not len(pairs.rows):
                    continue
                if len(pairs.rows) > scores.numel() // 4 and len(rows) > _GROUP:
                    # So many rows are equally near that they are no choice: settle them within the block.
                    pairs = self._best_of_block(rows, slice(top, top + len(block)))
                else:
                    pairs = _Pairs(pairs.queries + top, pairs.rows, pairs.scores)
                    if product.dtype is not torch.float32:
                        pairs = self._rescored(pairs, rows)
                        bound = candidates.kth_best_lower_bound - candidates.error_bound(longest)
                        pairs = pairs.select(pairs.scores >= bound[pairs.queries])
                pairs = _Pairs(pairs.queries, pairs.rows + first, pairs.scores)
                if self.exclude is not None:
                    pairs = pairs.select(self.exclude[pairs.queries] != pairs.rows)
                candidates.add(pairs, longest=longest)
        return candidates.settled()

    def _rows(self, numbers: Tensor) -> Tensor:  # int64 [m] -> float32 [m, D]
        return _prepare(self.train.index_select(0, numbers.to(self.train.device)), self.device, self.cosine)

    def _sample(self) -> Tensor:  # float32 [n, D]
        """Training rows at equal distances: more than k, few enough to cost nothing."""
        n = min(len(self.train), max(16 * self.k, 256, min(_LARGEST_SAMPLE, len(self.train) // 64)))
        return self._rows(torch.arange(n) * len(self.train) // n)

    def _lower_bound(self, sample: Tensor) -> Tensor:  # float32 [Q]
        """Lower bound of the k-th best similarity in the sample; that of all training rows is no less."""
        longest = float(torch.linalg.vector_norm(sample, dim=1).max())
        k = self.k + (self.exclude is not None)  # the excluded row may be among them
        kth_best = self.queries.new_empty(len(self.queries))
        for first in range(0, len(kth_best), self.query_block):
            block = self.queries[first : first + self.query_block]
            kth_best[first : first + self.query_block] = (block @ sample.T).topk(k, dim=1)[0][:, -1]
        return kth_best - _float32_error(torch.linalg.vector_norm(self.queries, dim=1), longest, sample.shape[1])

    def _fastest(self, sample: Tensor, lower_bound: Tensor) -> str:
        """bfloat16 where the device is fast in it, unless its rounding hides so much that candidates cost more."""
        if choose_precision("auto", self.device) is not torch.bfloat16:
            return "float32"
        if len(self.queries) * len(self.train) * sample.shape[1] < _SMALLEST_BFLOAT16_SEARCH:
            return "float32"
        product = PRODUCTS["bfloat16"]
        block, rows = product.quantise(self.queries[: self.query_block]), product.quantise(sample)
        lengths, errors = (_grouped(part, 0.0).amax(dim=1) for part in rows[1:])
        threshold = product.threshold(lower_bound[: self.query_block], block, lengths, errors)
        pairs = _above(product(block.values, rows.values, sample), threshold)
        # While the bound rises, each doubling of the rows that were seen brings about as many again.
        doubts = len(pairs.rows) / len(block.values) * (1 + math.log(len(self.train) / len(sample)))
        return "bfloat16" if doubts * _COST_OF_A_CANDIDATE < len(self.train) else "float32"

    def _best_of_block(self, rows: Tensor, part: slice) -> _Pairs:
        """The k best rows of a block for each of some queries, or one more where one is excluded, in float64."""
        products = _double(self.queries[part]) @ _double(rows).T
        best, columns = products.float().to(self.device).sort(dim=1, descending=True, stable=True)
        k = min(self.k + (self.exclude is not None), len(rows))
        queries = torch.arange(part.start, part.stop, device=self.device).unsqueeze(1).expand(-1, k)
        return _Pairs(queries.flatten(), columns[:, :k].flatten(), best[:, :k].flatten())

    def _rescored(self, pairs: _Pairs, rows: Tensor) -> _Pairs:
        """The same pairs with their similarity in float32."""
        scores = torch.empty(len(pairs.rows), device=self.device)
        for part in torch.arange(len(scores), device=self.device).split(_PAIRS_AT_ONCE):
            queries = self.queries.index_select(0, pairs.queries[part])
            scores[part] = queries.mul_(rows.index_select(0, pairs.rows[part])).sum(dim=1)
        return pairs._replace(scores=scores)


class _Candidates:
    """Pairs of a part of the queries that may be among the k best. Each pair is added once at most.

    Pairs are sorted in only when as many are new as are old, so that the sorting costs a small part of the products.
    """

    def __init__(self, queries: Tensor, read_rows: Callable[[Tensor], Tensor], *, k: int, lower_bound: Tensor) -> None:
        self._queries, self._read_rows, self._k = queries, read_rows, k
        self.kth_best_lower_bound = lower_bound
        """float32 [Q]: no row whose similarity is certainly below is a neighbour. It only rises."""
        self._lengths = torch.linalg.vector_norm(queries, dim=1)
        self._longest = 0.0
        none = torch.empty(0, dtype=torch.int64, device=queries.device)
        self._sorted = _Pairs(none, none, queries.new_empty(0))
        self._new: list[_Pairs] = []

    def error_bound(self, longest: float) -> Tensor:  # float32 [Q]
        """Error of a float32 similarity with a training row of at most this length."""
        return _float32_error(self._lengths, longest, self._queries.shape[1])

    def add(self, pairs: _Pairs, *, longest: float) -> None:
        """Take in pairs with rows of at most length `longest`; scores are float32 similarities or better."""
        self._longest = max(self._longest, longest)
        self._new.append(pairs)
        n_new = sum(len(new.rows) for new in self._new)
        if n_new >= max(len(self._sorted.rows), len(self._queries) * self._k // 2):
            self._sort_in()

    def settled(self) -> tuple[Tensor, Tensor]:  # float32 [Q, k], int64 [Q, k]
        """The k best of each query, by similarity, then by row."""
        self._sort_in()
        best = self._settle(self._sorted)
        return best.scores.view(-1, self._k), best.rows.view(-1, self._k)

    def _sort_in(self) -> None:
        pairs = _by_query_and_score(_concatenated([self._sorted, *self._new]))
        self._new = []
        last = _places(pairs) == self._k - 1
        error = self.error_bound(self._longest)
        kth_best = torch.full_like(self.kth_best_lower_bound, -torch.inf)
        kth_best[pairs.queries[last]] = pairs.scores[last]
        torch.maximum(self.kth_best_lower_bound, kth_best - error, out=self.kth_best_lower_bound)
        pairs = pairs.select(pairs.scores >= (self.kth_best_lower_bound - error)[pairs.queries])
        crowded = torch.bincount(pairs.queries, minlength=len(self._queries)) > 4 * self._k + 64
        if bool(crowded.any()):
            # Many rows that are equally near: float64 and their order decide already, so that they cannot pile up.
            is_crowded = crowded[pairs.queries]
            pairs = _concatenated([pairs.select(~is_crowded), self._settle(pairs.select(is_crowded))])
        self._sorted = pairs

    def _settle(self, pairs: _Pairs) -> _Pairs:
        """The k best pairs of each query, computed in float64, in the order of the queries."""
        pairs = pairs.select(pairs.rows.argsort(stable=True))
        scores = torch.empty_like(pairs.scores)
        for first in range(0, len(scores), _PAIRS_AT_ONCE):
            part = slice(first, first + _PAIRS_AT_ONCE)
            products = _double(self._read_rows(pairs.rows[part]))
            products *= _double(self._queries.index_select(0, pairs.queries[part]))
            scores[part] = products.sum(dim=1).float().to(scores.device)
        pairs = _by_query_and_score(pairs._replace(scores=scores))
        return pairs.select(_places(pairs) < self._k)


def merge_neighbours(similarities: Tensor, indices: Tensor, *, k: int) -> tuple[Tensor, Tensor]:  # [Q, n] -> [Q, k]
    """The k best of candidates [Q, n]: similarity descending, then index ascending."""
    by_index = indices.argsort(dim=1, stable=True)
    similarities, indices = similarities.gather(1, by_index), indices.gather(1, by_index)
    by_similarity = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarities.gather(1, by_similarity), indices.gather(1, by_similarity)


def _above(scores: Tensor, threshold: Tensor) -> _Pairs:  # [q, b], [q, g]
    """Pairs (row, column) of the scores that reach the threshold of their group."""
    grouped = _grouped(scores, -torch.inf)  # [q, g, _GROUP]
    query, group = (grouped.amax(dim=2) >= threshold).nonzero(as_tuple=True)
    # Whole groups are copied, which is far quicker than to pick single values.
    number = query * grouped.shape[1] + group
    values = grouped.flatten(0, 1).index_select(0, number)  # [h, _GROUP]
    hit, within = (values >= threshold.flatten()[number].unsqueeze(1)).nonzero(as_tuple=True)
    return _Pairs(query[hit], group[hit] * _GROUP + within, values[hit, within].float())


def _grouped(values: Tensor, fill: float) -> Tensor:  # [..., b] -> [..., g, _GROUP]
    missing = -values.shape[-1] % _GROUP
    return (pad(values, (0, missing), value=fill) if missing else values).unflatten(-1, (-1, _GROUP))


def _double(rows: Tensor) -> Tensor:
    return (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS knows no float64


def _concatenated(parts: list[_Pairs]) -> _Pairs:
    return _Pairs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _by_query_and_score(pairs: _Pairs) -> _Pairs:
    """Sorted by query, then by score descending; equal ones stay in the order in which they are."""
    # One whole number for both, which sorts several times faster than floats do. The bits of a float ascend with it,
    # but for the negative ones, whose lower bits descend; adding 0 makes -0 a 0.
    bits = (pairs.scores + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return pairs.select(((pairs.queries << 32) - ascending).argsort(stable=True))


def _places(pairs: _Pairs) -> Tensor:  # int64 [m]
    """The place of each sorted pair among those of its query, from 0."""
    counts = torch.bincount(pairs.queries)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(pairs.rows), device=counts.device) - starts[pairs.queries]


def _summation_bound(width: int) -> float:
    """Error of a sum of `width` products in float32, over the product of the two lengths."""
    steps = (width + 24) * 2.0**-24  # a few more than the sum has: lengths are computed too
    return steps / (1 - steps)


def _float32_error(lengths: Tensor, longest: float, width: int) -> Tensor:  # float32 [Q] -> [Q]
    """Error of a float32 similarity between queries of these lengths and a row of at most the other length."""
    bound = _summation_bound(width)
    return lengths * (bound * (1 + 2 * bound) * longest)


def _check(queries: Tensor, train: Tensor, k: int, exclude: Tensor | None, product: str, backend: str) -> None:
    available = max(0, len(train) - (exclude is not None))
    if not 1 <= k <= available:
        raise DataError(f"{k} neighbours were asked for, but there are {available} to choose from")
    if queries.ndim != 2 or train.ndim != 2 or queries.shape[1] != train.shape[1]:
        raise DataError(
            f"queries {list(queries.shape)} and training features {list(train.shape)} must have the same width; "
            "extract both with the same model"
        )
    if product not in ("auto", *PRODUCTS):
        raise ConfigError(f"no product is called {product!r}; choose auto, {', '.join(PRODUCTS)}")
    if backend not in ("torch", "faiss", "faiss-ivf"):
        raise ConfigError(f"no search backend is called {backend!r}; choose torch, faiss, faiss-ivf")


def _prepare(rows: Tensor, device: torch.device, cosine: bool) -> Tensor:
    rows = rows.to(device).float()
    require_finite(rows)
    return normalize(rows, dim=1) if cosine else rows


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bfloat16 inside float32 products, whatever the training around has switched on."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        # Else sums of bfloat16 products may be added up in bfloat16, which the error bound knows nothing of.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
