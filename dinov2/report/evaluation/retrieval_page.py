"""One HTML page of a retrieval, complete in itself: figures with intervals, how queries fare, some of them as pictures.

Names of models, classes and files are not ours, so every text is escaped on its way into the page.
"""

from html import escape

from dinov2.report.evaluation.parts import dot_card, scale_line
from dinov2.report.evaluation.record import RetrievalRecord
from dinov2.report.evaluation.style import EVALUATION_STYLE
from dinov2.report.neighbour_page import SHOT_STYLE, shot_section
from dinov2.report.theme import framed, written

__all__ = ["retrieval_page"]

_BINS = 10

_MEANINGS = {
    "mAP": "mean average precision: how early all right images come",
    "recall@k": "share of queries with a right image among the first k",
    "mP@k": "share of right images among the first k",
    "GAP": "precision of the first images of all queries, the most confident first",
}


def retrieval_page(record: RetrievalRecord) -> str:
    """The page as text."""
    sections = [
        f'<section id="figures"><h2>Figures</h2>{_figures(record)}</section>',
        *(
            shot_section(f"queries{number}", group.heading, group.lead, group.rows)
            for number, group in enumerate(record.groups)
        ),
        f'<section id="measured"><h2>How it was measured</h2>{_measured(record)}</section>',
    ]
    anchors = [
        ("figures", "Figures"),
        *((f"queries{number}", group.heading) for number, group in enumerate(record.groups)),
        ("measured", "How it was measured"),
    ]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in anchors)
    return framed(
        record.title,
        eyebrow="Retrieval",
        heading=record.title,
        facts=record.facts,
        bar=f"<nav><div>{links}</div></nav>",
        main="\n".join(sections),
        footer=f"{written()} This file is complete in itself.",
        style=SHOT_STYLE + EVALUATION_STYLE + _STYLE,
    )


def _figures(record: RetrievalRecord) -> str:
    blocks = []
    for number, (protocol, figures) in enumerate(record.figures.items(), start=1):
        color = 1 + (number - 1) % 5
        lines = "".join(
            scale_line(metric, estimate, 0.0, 1.0, color=color, about=protocol) for metric, estimate in figures.items()
        )
        blocks.append(f"<h3>{escape(protocol)}</h3>{lines}" if protocol else lines)
    shown = {metric.partition("@")[0] for figures in record.figures.values() for metric in figures}
    meanings = "; ".join(
        f"<b>{name}</b> {meaning}" for name, meaning in _MEANINGS.items() if name.partition("@")[0] in shown
    )
    lead = "In per cent, with 95 % intervals: how far a figure may move with another draw of as many queries."
    notes = "".join(f"<li>{escape(note)}</li>" for note in record.notes)
    return (
        f'<p class="lead">{lead}</p>{dot_card("".join(blocks), 0.0, 1.0)}'
        f'<p class="note meanings">{meanings}.</p>'
        + (f'<ul class="note notes">{notes}</ul>' if notes else "")
        + _histogram(record)
    )


def _histogram(record: RetrievalRecord) -> str:
    """How many queries have which average precision."""
    counts = [0] * _BINS
    for precision in record.precisions:
        counts[min(int(precision * _BINS), _BINS - 1)] += 1
    if sum(counts) < _BINS:
        return ""
    most = max(counts)
    bars = "".join(
        f'<div title="{count:,} queries with an average precision of {100 * i // _BINS} to '
        f'{100 * (i + 1) // _BINS} %"><span>{count:,}</span><i style="height:{100 * count / most:.1f}%"></i></div>'
        for i, count in enumerate(counts)
    )
    return (
        f'<div class="card apart"><h3>Average precision of {sum(counts):,} queries</h3>'
        f'<div class="histogram">{bars}</div>'
        '<div class="ends"><span>0 %</span><span>50 %</span><span>100 %</span></div></div>'
    )


def _measured(record: RetrievalRecord) -> str:
    def table(facts: dict[str, str]) -> str:
        rows = "".join(
            f'<tr><td>{escape(name)}</td><td class="mono">{escape(value)}</td></tr>' for name, value in facts.items()
        )
        return f'<table class="settings">{rows}</table>'

    return (
        f'<div class="card">{table(dict(record.measured))}<details><summary>Versions and hardware</summary>'
        f"{table(dict(record.environment))}</details></div>"
    )


_STYLE = """
section:first-child h2 { margin-top: 1.6rem; }
.meanings { margin-top: .8rem; max-width: none; }
.meanings b { color: var(--ink); font-weight: 600; }
.shots { grid-template-columns: repeat(11, minmax(0, 1fr)); padding: .9rem 1rem; }
.shots figure.query { padding-right: .6rem; border-right: 1px solid var(--line); }
.shots figcaption span { -webkit-line-clamp: 1; }
.shots figcaption span, .shots figcaption b { font-size: .72rem; }
.shots .wrong figcaption span { color: var(--bad); }
.shots .right b::before { content: "✓ "; color: var(--good); }
.shots .wrong b::before { content: "✗ "; color: var(--bad); }
@media (max-width: 52rem) { .shots { grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); } }
.histogram { display: grid; grid-template-columns: repeat(10, 1fr); gap: 3px; height: 9rem; margin-top: .6rem; }
.histogram div { display: flex; flex-direction: column; justify-content: flex-end; height: 100%; }
.histogram i { display: block; flex: none; background: var(--c1); border-radius: 4px 4px 0 0; min-height: 2px;
  max-height: calc(100% - 1.2rem); }
.histogram span { color: var(--muted); font-size: .72rem; text-align: center; line-height: 1.2rem;
  font-variant-numeric: tabular-nums; }
"""
