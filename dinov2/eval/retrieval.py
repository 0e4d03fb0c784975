"""Image retrieval: rank a gallery by cosine similarity to each query, and measure how early the right images come.

The truth of a query is two lists of gallery numbers: `positives` should come first, `ignored` count as absent (the
query itself, or images that are neither right nor wrong); all others are wrong. Of equal similarities the lower gallery
number comes first. A query without positives has no average precision and is left out of the means, not counted as 0.

Two average precisions are in use. `step`: the mean over the positives of the precision at their rank, 0 for those never
found (information retrieval, scikit-learn). `trapezoid`: the area under the line that joins the points of the
precision-recall curve, which landmark retrieval has used since Oxford5k (Philbin et al. 2007), a little lower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError
from dinov2.eval.metrics import bootstrap_interval
from dinov2.eval.result import Result
from dinov2.eval.scoring import Provenance

__all__ = [
    "AveragePrecisionKind",
    "QueryTruth",
    "Ranking",
    "average_precision",
    "evaluate_retrieval",
    "global_average_precision",
    "precision_at",
    "rank_gallery",
    "truth_by_class",
]

AveragePrecisionKind = Literal["step", "trapezoid"]
"""Kind of average precision."""

_SIMILARITIES_AT_ONCE = 16_000_000


@dataclass(frozen=True)
class QueryTruth:
    """Relevant images of the gallery for one query, by number."""

    positives: Tensor
    """int64 [P]."""
    ignored: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [J]."""


class Ranking(NamedTuple):
    """Ranks of the relevant images for one query."""

    ranks: Tensor
    """int64 [P], ascending: places of the positives from 0, as if the ignored images were not there."""
    confidence: float
    """Similarity of the first image that is not ignored; -inf when all are."""


def evaluate_retrieval(
    queries: Tensor,  # [Q, D]
    gallery: Tensor,  # [S, D]
    truth: Sequence[QueryTruth],
    *,
    ks: Sequence[int] = (1, 5, 10),
    precision: AveragePrecisionKind = "step",
    device: torch.device | str | None = None,
    task: str = "retrieval",
    provenance: Provenance | None = None,
) -> list[Result]:
    """mAP, and for each k the recall and the precision among the first k, and GAP: in percent, over the queries.

    - `mAP`: mean of `average_precision`.
    - `recall@k`: share of queries with a positive among the first k.
    - `mP@k`: mean of `precision_at`.
    - `GAP`: `global_average_precision` of the first image of every query; those without positives count as
      distractors.

    Intervals are percentile bootstraps over the queries, 95 %.

    Raises:
        DataError: there is no query with a positive, widths or lengths differ, a number lies outside the gallery, or a
            feature is not finite.
        ConfigError: a k is below 1, or no such precision exists.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"images are counted from the first, got k = {sorted(ks)}; write numbers from 1")
    rankings = rank_gallery(queries, gallery, truth, device=device)
    found = [ranking for ranking in rankings if len(ranking.ranks)]
    if not found:
        raise DataError("no query has a right image in the gallery, so there is nothing to find; look at the truth")
    per_query: dict[tuple[str, int | None], list[float]] = {}
    per_query["mAP", None] = [average_precision(r.ranks, precision=precision) for r in found]
    for k in sorted(set(ks)):
        per_query["recall@k", k] = [float(r.ranks[0] < k) for r in found]
        per_query["mP@k", k] = [precision_at(r.ranks, k) for r in found]
    without = len(rankings) - len(found)
    notes = (f"{without} queries have no right image in the gallery and are left out of the means",) if without else ()
    settings = {"average_precision": precision, "n_gallery": len(gallery), "n_queries": len(truth)}
    provenance = provenance or {}
    rows = []
    for (metric, among), values in per_query.items():
        low, high = bootstrap_interval(torch.tensor(values))
        row = Result(
            task=task,
            metric=metric.replace("@k", f"@{among}"),
            k=among,
            value=100 * sum(values) / len(values),
            ci=(100 * low, 100 * high),
            n=len(found),
            settings=settings,
            notes=notes,
            **provenance,
        )
        rows.append(row)
    confidences = torch.tensor([ranking.confidence for ranking in rankings])
    correct = torch.tensor([len(r.ranks) > 0 and int(r.ranks[0]) == 0 for r in rankings])
    gap = 100 * global_average_precision(confidences, correct, n_with_match=len(found))
    return [*rows, Result(task=task, metric="GAP", value=gap, n=len(rankings), settings=settings, **provenance)]


def average_precision(
    ranks: Tensor, *, precision: AveragePrecisionKind = "step"
) -> float:  # int64 [P], ascending, from 0
    """Average precision of a query whose P positives are at these ranks; NaN when there is none.

    `step`: (1/P) sum_j (j + 1) / (r_j + 1). `trapezoid`: (1/P) sum_j (a_j + b_j) / 2 with b_j = (j + 1) / (r_j + 1) and
    a_j = j / r_j, or 1 at rank 0 (Radenovic et al. 2018, "Revisiting Oxford and Paris").
    """
    if precision not in ("step", "trapezoid"):
        raise ConfigError(f"no average precision is called {precision!r}; choose step or trapezoid")
    if not len(ranks):
        return float("nan")
    place = torch.arange(len(ranks), dtype=torch.float64)
    after = (place + 1) / (ranks.double() + 1)
    if precision == "step":
        return float(after.mean())
    before = torch.where(ranks > 0, place / ranks.double().clamp_min(1), 1.0)
    return float((before + after).mean() / 2)


def precision_at(ranks: Tensor, k: int) -> float:  # int64 [P], ascending, from 0
    """Share of positives among the first k; where the last positive comes earlier, among the images up to it.

    So a query with fewer than k positives can reach 1 (the revisited Oxford and Paris protocol). NaN without positives.
    """
    if not len(ranks):
        return float("nan")
    k = min(k, int(ranks[-1]) + 1)
    return float((ranks < k).sum()) / k


def global_average_precision(
    confidences: Tensor,  # [Q] of each query's answer
    correct: Tensor,  # bool [Q]
    *,
    n_with_match: int,
) -> float:
    """GAP: all answers sorted by confidence, then (1/M) sum_i P(i) rel(i), M being the queries that have a match.

    P(i) is the precision of the first i answers, rel(i) whether the i-th is right. A confident answer to a query that
    has no match costs precision. Of equal confidences the earlier query comes first. Perronnin et al. 2009, "A family
    of contextual measures of similarity between distributions with application to image retrieval".
    """
    if n_with_match < 1:
        raise DataError("no query has a match, so GAP is not defined; look at the truth")
    right = correct[confidences.argsort(descending=True, stable=True)].double()
    precisions = right.cumsum(0) / torch.arange(1, len(right) + 1, dtype=torch.float64)
    return float((precisions * right).sum() / n_with_match)


def rank_gallery(
    queries: Tensor,  # [Q, D]
    gallery: Tensor,  # [S, D]
    truth: Sequence[QueryTruth],
    *,
    device: torch.device | str | None = None,
) -> list[Ranking]:
    """Rank the whole gallery for every query by cosine similarity, in blocks of queries."""
    _check(queries, gallery, truth)
    device = queries.device if device is None else torch.device(device)
    rows = normalize(gallery.to(device).float(), dim=1)
    rankings = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for first in range(0, len(queries), max(1, _SIMILARITIES_AT_ONCE // len(gallery))):
            part = slice(first, first + max(1, _SIMILARITIES_AT_ONCE // len(gallery)))
            similarities = normalize(queries[part].to(device).float(), dim=1) @ rows.T  # [q, S]
            orders = similarities.argsort(dim=1, descending=True, stable=True)
            for own, order, one in zip(similarities.cpu(), orders.cpu(), truth[part], strict=True):
                rankings.append(_ranking(own, order, one))
    return rankings


def truth_by_class(
    query_labels: Tensor,  # int64 [Q], -1 for none
    gallery_labels: Tensor,  # int64 [S], in the same numbering
    *,
    same_image: Tensor | None = None,  # int64 [Q]
) -> list[QueryTruth]:
    """Right are the gallery's images of the query's class; images without a label are wrong.

    Args:
        same_image: the gallery's number of each query itself, which is ignored; -1 where the gallery lacks it.
    """
    members: dict[int, Tensor] = {
        int(label): (gallery_labels == label).nonzero().squeeze(1) for label in query_labels.unique() if label >= 0
    }
    nothing = torch.empty(0, dtype=torch.int64)
    truth = []
    for number, label in enumerate(query_labels.tolist()):
        positives = members.get(label, nothing)
        itself = -1 if same_image is None else int(same_image[number])
        truth.append(
            QueryTruth(positives[positives != itself], torch.tensor([itself])) if itself >= 0 else QueryTruth(positives)
        )
    return truth


def _ranking(similarities: Tensor, order: Tensor, truth: QueryTruth) -> Ranking:  # [S], int64 [S]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    places = place[truth.positives].sort()[0]
    ignored = place[truth.ignored].sort()[0]
    ranks = places - torch.searchsorted(ignored, places)
    # The first place that no ignored image takes.
    first = int((ignored == torch.arange(len(ignored))).int().cumprod(0).sum())
    confidence = float(similarities[order[first]]) if first < len(order) else float("-inf")
    return Ranking(ranks, confidence)


def _check(queries: Tensor, gallery: Tensor, truth: Sequence[QueryTruth]) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"queries {list(queries.shape)} and gallery {list(gallery.shape)} must have the same width; "
            "extract both with the same model"
        )
    if len(truth) != len(queries):
        raise DataError(f"there are {len(queries)} queries and the truth of {len(truth)}; give one for each query")
    if not len(gallery):
        raise DataError("the gallery holds no images, so there is nothing to rank")
    require_finite(queries, of="queries")
    require_finite(gallery)
    for number, one in enumerate(truth):
        named = torch.cat([one.positives, one.ignored])
        if len(named) and (int(named.min()) < 0 or int(named.max()) >= len(gallery)):
            raise DataError(
                f"the truth of query {number} names gallery image {int(named.max())} (or a negative one), but there "
                f"are {len(gallery)}; is it of another gallery?"
            )
        if len(named.unique()) < len(named):
            raise DataError(f"the truth of query {number} names an image twice; each is right, ignored or neither")
