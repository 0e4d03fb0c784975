"""The page of a retrieval: figures with intervals, a histogram of the queries, some of them as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dinov2.eval.metrics import Estimate
from dinov2.report.neighbours import ShotRow
from dinov2.report.render import render

__all__ = ["QueryGroup", "RetrievalRecord", "retrieval_page"]

_BINS = 10

_MEANINGS = {
    "mAP": "mean average precision: how early all right images come",
    "recall@k": "share of queries with a right image among the first k",
    "mP@k": "share of right images among the first k",
    "GAP": "precision of the first images of all queries, the most confident first",
}


@dataclass(frozen=True)
class QueryGroup:
    """Some queries and their neighbours."""

    heading: str
    lead: str
    rows: Sequence[ShotRow]


@dataclass(frozen=True)
class RetrievalRecord:
    """Input data of the page."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(name, value) for the head of the page."""
    figures: Mapping[str, Mapping[str, Estimate]]
    """By protocol ("" where there is one only), then by metric, as fractions; NaN for bounds that are not known."""
    precisions: Sequence[float]
    """Average precision of the queries that were looked at."""
    groups: Sequence[QueryGroup]
    measured: Mapping[str, str]
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def retrieval_page(record: RetrievalRecord) -> str:
    """The page as text."""
    shown = {metric.partition("@")[0] for figures in record.figures.values() for metric in figures}
    counts = [0] * _BINS
    for precision in record.precisions:
        counts[min(int(precision * _BINS), _BINS - 1)] += 1
    groups = {f"queries{number}": group.heading for number, group in enumerate(record.groups)}
    return render(
        "retrieval.html.jinja",
        heading=record.title,
        facts=record.facts,
        record=record,
        sections={"figures": "Figures", **groups, "measured": "How it was measured"},
        meanings={name: text for name, text in _MEANINGS.items() if name.partition("@")[0] in shown},
        histogram=counts if sum(counts) >= _BINS else None,
    )
