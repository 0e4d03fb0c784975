"""One HTML page of an evaluation, complete in itself: figures with intervals, differences, classes, mistakes.

Names of models, classes and files are not ours, so every text is escaped on its way into the page.
"""

from collections.abc import Callable
from html import escape

from dinov2.report.evaluation.parts import (
    class_bars,
    confusion_table,
    dots,
    figure_table,
    legend,
    mistake_cards,
    pair_table,
    pairs_of_classes,
    reliability_chart,
)
from dinov2.report.evaluation.record import EvaluationRecord
from dinov2.report.evaluation.style import EVALUATION_STYLE
from dinov2.report.theme import framed, written

__all__ = ["evaluation_page"]


def evaluation_page(record: EvaluationRecord) -> str:
    """The page as text. Classes, confusions, calibration and mistakes are shown method by method, the last one open."""
    sections = [
        ("figures", "Figures", _figures(record)),
        ("classes", "Classes", _per_method(record, _classes, coloured=True)),
        ("confusions", "Confusions", _per_method(record, _confusions)),
        ("calibration", "Calibration", _per_method(record, _calibrations)),
        ("mistakes", "Worst mistakes", _per_method(record, _mistakes, coloured=True)),
        ("measured", "How it was measured", _measured(record)),
    ]
    if record.pairs:
        sections.insert(1, ("differences", "Differences between models", _differences(record)))
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    return framed(
        record.title,
        eyebrow="Evaluation",
        heading=record.title,
        facts=record.facts,
        bar=f"<nav><div>{links}</div></nav>",
        main="\n".join(
            f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>' for anchor, title, body in sections
        ),
        footer=f"{written()} This file is complete in itself.",
        style=EVALUATION_STYLE,
    )


def _figures(record: EvaluationRecord) -> str:
    lead = "Top-1 accuracy in per cent with its 95 % interval: how far it may move with another draw of as many images."
    notes = "".join(f"<li>{escape(note)}</li>" for note in record.notes)
    notes = f'<ul class="note notes">{notes}</ul>' if notes else ""
    return f'<p class="lead">{lead}</p>{dots(record)}<h3 class="apart">All figures</h3>{figure_table(record)}{notes}'


def _differences(record: EvaluationRecord) -> str:
    lead = (
        "Points of top-1 on the same images, so that easy and hard ones cancel out; right alone are images that only "
        "the first-named or only the other model has right. A difference is coloured when its interval leaves out "
        "zero; p is how often equally good models would differ this much or more, Holm’s corrected for the number of "
        "comparisons on this page."
    )
    return f'<p class="lead">{lead}</p>{pair_table(record)}'


def _per_method(
    record: EvaluationRecord, build: Callable[[EvaluationRecord, str], str], *, coloured: bool = False
) -> str:
    folds = []
    methods = record.method_names()
    for method in methods:
        body = build(record, method)
        if not body:
            continue
        opened = " open" if method == methods[-1] else ""
        folds.append(f"<details{opened}><summary>{escape(method)}</summary>{body}</details>")
    if not folds:
        return ""
    colours = legend(record) if coloured else ""
    if len(methods) == 1:  # nothing to choose from
        return f"{colours}{build(record, methods[0])}"
    return f'{colours}<div class="folds">{"".join(folds)}</div>'


def _classes(record: EvaluationRecord, method: str) -> str:
    shown = [one for one in record.of(method) if one.recalls]
    return class_bars(record, shown) if shown else ""


def _confusions(record: EvaluationRecord, method: str) -> str:
    parts = [confusion_table(one) or pairs_of_classes(one) for one in record.of(method) if one.recalls]
    return f'<div class="twos">{"".join(parts)}</div>' if parts else ""


def _calibrations(record: EvaluationRecord, method: str) -> str:
    parts = [reliability_chart(record, one) for one in record.of(method) if one.bins is not None]
    lead = "<p class=note>On the dashed line a model is right as often as it says. Larger dots are more images.</p>"
    return f'{lead}<div class="grid">{"".join(parts)}</div>' if parts else ""


def _mistakes(record: EvaluationRecord, method: str) -> str:
    parts = [
        (f"<h3>{escape(one.model)}</h3>" if len(record.models) > 1 else "") + mistake_cards(record, one)
        for one in record.of(method)
        if one.recalls
    ]
    others = " A dot of another model’s colour stands before its own answer." if len(record.models) > 1 else ""
    lead = f"<p class=note>What the image shows, and what the model was surest of instead.{others}</p>"
    return f"{lead}{''.join(parts)}" if parts else ""


def _measured(record: EvaluationRecord) -> str:
    names = list(dict.fromkeys(name for model in record.models for name in model.facts))
    head = "".join(f"<th>{escape(model.name)}</th>" for model in record.models)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="mono">{escape(model.facts.get(name, "–"))}</td>' for model in record.models)
        + "</tr>"
        for name in names
    )
    facts = "".join(
        f'<tr><td>{escape(name)}</td><td class="mono">{escape(value)}</td></tr>'
        for name, value in record.environment.items()
    )
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<div class="card apart"><details><summary>Versions and hardware</summary><table class="settings">{facts}'
        "</table></details></div>"
    )
