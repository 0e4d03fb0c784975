"""Pieces of the page: figures with intervals, bars of classes, confusions, reliability curves, mistakes."""

import base64
import math
from collections.abc import Sequence
from html import escape

from dinov2.eval.intervals import Estimate
from dinov2.report.evaluation.record import EvaluationRecord, MethodRecord, PicturedMistake

__all__ = [
    "class_bars",
    "confusion_table",
    "dot_card",
    "dots",
    "figure_table",
    "legend",
    "mistake_cards",
    "pair_table",
    "pairs_of_classes",
    "percent",
    "reliability_chart",
    "scale_line",
]

_MOST_CLASSES = 24
_MOST_NAMED = 40
_SIDE = 1000
_CALIBRATION = {"ece": "ECE", "log-loss": "log-loss", "brier": "Brier", "aurc": "AURC"}
_NO_PERCENT = ("log-loss", "brier")


def percent(value: float, *, digits: int = 1) -> str:
    """A fraction in per cent, without the sign."""
    return "–" if not math.isfinite(value) else f"{100 * value:.{digits}f}"


def legend(record: EvaluationRecord) -> str:
    """The colour of each model; nothing where there is only one."""
    if len(record.models) < 2:
        return ""
    items = "".join(
        f'<li><i style="background:var(--c{record.color(model.name)})"></i>{escape(model.name)}</li>'
        for model in record.models
    )
    return f'<ul class="legend">{items}</ul>'


def dots(record: EvaluationRecord, metric: str = "top-1") -> str:
    """A point with its interval for each model and method, on one scale that shows the differences."""
    shown = [(one, one.figures[metric]) for one in record.methods if metric in one.figures]
    if not shown:
        return ""
    low, high = min(estimate.low for _, estimate in shown), max(estimate.high for _, estimate in shown)
    margin = max(0.02, 0.08 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)

    blocks = []
    for method in record.method_names():
        lines = []
        for one, estimate in shown:
            if one.method != method:
                continue
            lines.append(scale_line(one.model, estimate, low, high, color=record.color(one.model), about=method))
        setting = next((one.setting for one in record.of(method)), "")
        same = all(one.setting == setting for one in record.of(method))
        head = f"{escape(method)} <span>{escape(setting) if same else ''}</span>"
        blocks.append(f"<h3>{head}</h3>{''.join(lines)}")
    return dot_card("".join(blocks), low, high)


def dot_card(lines: str, low: float, high: float) -> str:
    """Lines of `scale_line`, with headings between them, above the ends of their scale."""
    ends = f"<span>{percent(low, digits=0)} %</span><span>{percent(high, digits=0)} %</span>"
    return f'<div class="card dots">{lines}<div class="ends">{ends}</div></div>'


def scale_line(who: str, estimate: Estimate, low: float, high: float, *, color: int, about: str = "") -> str:
    """A point on a scale from `low` to `high`, with its interval unless that is not known (NaN)."""

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    span = label = ""
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        label = _interval(estimate)
        span = (
            f'<i class="range" style="left:{at(estimate.low)};right:calc(100% - {at(estimate.high)});'
            f'background:var(--c{color})"></i>'
        )
    spoken = f"{', '.join(filter(None, [who, about]))}: {percent(estimate.value)} %{f' ({label})' if label else ''}"
    return (
        f'<div class="who">{escape(who)}</div><div class="scale" role="img" aria-label="{escape(spoken)}">{span}'
        f'<i class="point" style="left:{at(estimate.value)};background:var(--c{color})"></i></div>'
        f'<div class="value">{percent(estimate.value)}<small> {label}</small></div>'
    )


def figure_table(record: EvaluationRecord) -> str:
    """All figures, a row for each method and metric, a column for each model; the best of a row is bold."""
    head = "".join(f"<th>{escape(model.name)}</th>" for model in record.models)
    rows = []
    for method in record.method_names():
        by_model = {one.model: one for one in record.of(method)}
        metrics = list(dict.fromkeys(metric for one in by_model.values() for metric in one.figures))
        for number, metric in enumerate(metrics):
            values = {name: one.figures[metric] for name, one in by_model.items() if metric in one.figures}
            best = max(estimate.value for estimate in values.values())
            cells = "".join(_figure_cell(values.get(model.name), best, len(values)) for model in record.models)
            first = f'<th rowspan="{len(metrics)}">{escape(method)}</th>' if number == 0 else ""
            rows.append(f"<tr>{first}<td>{escape(metric)}</td>{cells}</tr>")
        if len(by_model) and any(one.setting for one in by_model.values()):
            settings = "".join(
                f'<td class="note">{escape(by_model[model.name].setting) if model.name in by_model else ""}</td>'
                for model in record.models
            )
            rows.append(f'<tr class="settingrow"><td></td><td class="note">setting</td>{settings}</tr>')
    return (
        '<div class="card scroll"><table class="figures"><thead><tr><th></th><th>metric, %</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def pair_table(record: EvaluationRecord) -> str:
    """Differences between models on the same images."""
    rows = []
    for pair in record.pairs:
        found = pair.comparison
        sure = found.difference.low > 0 or found.difference.high < 0
        kind = "" if not sure else "better" if found.difference.value > 0 else "worse"
        rows.append(
            f"<tr><td>{escape(pair.method)}</td><td>{escape(pair.second)} − {escape(pair.first)}</td>"
            f'<td class="number {kind}">{_signed(found.difference.value)}</td>'
            f'<td class="number">{_signed(found.difference.low)} to {_signed(found.difference.high)}</td>'
            f'<td class="number">{found.only_second:,} / {found.only_first:,}</td>'
            f'<td class="number">{_p(found.p_value)}</td><td class="number">{_p(pair.p_holm)}</td></tr>'
        )
    return (
        '<div class="card scroll"><table class="pairs"><thead><tr><th>method</th><th>difference</th>'
        "<th>points</th>"
        "<th>95 % interval</th><th>right alone</th><th>McNemar p</th><th>Holm p</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def class_bars(record: EvaluationRecord, methods: Sequence[MethodRecord]) -> str:
    """Recall of each class for each model; of many classes those with the lowest recall of the first model."""
    recalls = {one.model: {recall.name: recall for recall in one.recalls} for one in methods}
    names = [recall.name for recall in methods[0].recalls]
    chosen, lead = names, ""
    if len(names) > _MOST_CLASSES:
        first = recalls[methods[0].model]
        chosen = sorted(names, key=lambda name: first[name].hits / first[name].n)[:_MOST_CLASSES]
        lead = (
            f'<p class="note">The {_MOST_CLASSES} classes of {len(names):,} that {escape(methods[0].model)} recalls '
            "least; all are in the results file.</p>"
        )
    rows = []
    for name in chosen:
        bars = []
        for one in methods:
            recall = recalls[one.model].get(name)
            if recall is None:
                continue
            share = recall.hits / recall.n
            title = f"{one.model}: {recall.hits:,} of {recall.n:,}"
            bars.append(
                f'<div class="bar" title="{escape(title)}"><i style="width:{100 * share:.1f}%;'
                f'background:var(--c{record.color(one.model)})"></i><span>{percent(share, digits=0)}</span></div>'
            )
        rows.append(f'<div class="label" title="{escape(name)}">{escape(name)}</div><div>{"".join(bars)}</div>')
    return f'{lead}<div class="card classbars">{"".join(rows)}</div>'


def confusion_table(one: MethodRecord) -> str:
    """The matrix as shades: rows are the truth, columns the answer, each row in per cent of its images."""
    if not one.confusion or len(one.class_names) > _MOST_NAMED:
        return ""
    names = one.class_names
    head = "".join(f"<th><span>{escape(_short(name))}</span></th>" for name in names)
    rows = []
    for name, counts in zip(names, one.confusion, strict=True):
        total = sum(counts)
        cells = []
        for column, count in enumerate(counts):
            share = count / total if total else 0.0
            right = names[column] == name
            title = f"{name} taken for {names[column]}: {count:,} of {total:,}"
            text = f"{100 * share:.0f}" if share >= 0.005 and len(names) <= 20 else ""
            kind = "right" if right else "wrong"
            cells.append(
                f'<td class="{kind}{" dark" if share > 0.55 else ""}" style="--s:{share:.3f}" title="{escape(title)}">'
                f"{text}</td>"
            )
        rows.append(f'<tr><th title="{escape(name)}">{escape(_short(name))}</th>{"".join(cells)}</tr>')
    return (
        f'<figure class="card confusion"><figcaption><h3>{escape(one.model)}</h3></figcaption><div class="scroll">'
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def pairs_of_classes(one: MethodRecord) -> str:
    """The most frequent confusions as a table."""
    if not one.pairs:
        return (
            f'<figure class="card"><figcaption><h3>{escape(one.model)}</h3></figcaption>'
            '<p class="absent">no mistake between two known classes</p></figure>'
        )
    rows = "".join(
        f'<tr><td>{escape(pair.true)}</td><td>{escape(pair.predicted)}</td><td class="number">{pair.n:,}</td>'
        f'<td class="number">{percent(pair.share)} %</td></tr>'
        for pair in one.pairs
    )
    return (
        f'<figure class="card"><figcaption><h3>{escape(one.model)}</h3></figcaption><div class="scroll"><table>'
        f"<thead><tr><th>shows</th><th>taken for</th><th>images</th><th>of the class</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></figure>"
    )


def reliability_chart(record: EvaluationRecord, one: MethodRecord) -> str:
    """Accuracy over confidence, a dot for each bin whose area grows with its images, beside the summary figures."""
    assert one.bins is not None
    color = f"var(--c{record.color(one.model)})"
    filled = [
        (n, confidence, right) for n, confidence, right in zip(*(part.tolist() for part in one.bins), strict=True) if n
    ]
    most = max(n for n, _, _ in filled)
    line = "L".join(f"{_at(confidence)} {_at(1 - right)}" for _, confidence, right in filled)
    circles = "".join(
        f'<circle cx="{_at(confidence)}" cy="{_at(1 - right)}" r="{8 + 26 * math.sqrt(n / most):.0f}"'
        f' fill="{color}" fill-opacity=".85"><title>{n:,} images: {percent(confidence)} % sure, '
        f"{percent(right)} % right</title></circle>"
        for n, confidence, right in filled
    )
    grid = "".join(f"M0 {y}H{_SIDE}M{y} 0V{_SIDE}" for y in (0, 250, 500, 750, 1000))
    summary = "".join(
        f'<li title="{escape(_bounds(name, estimate))}">{label} <b>{_calibration_value(name, estimate.value)}</b></li>'
        for name, label in _CALIBRATION.items()
        if (estimate := one.calibration.get(name)) is not None
    )
    return (
        f'<figure class="card reliability"><figcaption><h3>{escape(one.model)}</h3><ul class="chips">{summary}</ul>'
        f'</figcaption><div class="square"><svg viewBox="-40 -40 1080 1080" role="img" '
        f'aria-label="accuracy over confidence of {escape(one.model)}">'
        f'<path d="{grid}" stroke="var(--grid)" stroke-width="3" fill="none"/>'
        f'<path d="M0 {_SIDE}L{_SIDE} 0" stroke="var(--c0)" stroke-width="4" stroke-dasharray="14 14" fill="none"/>'
        f'<path d="M{line}" stroke="{color}" stroke-width="7" fill="none" stroke-linejoin="round"/>{circles}</svg>'
        '<span class="y">right</span><span class="x">sure</span><span class="o">0</span><span class="e">100 %</span>'
        "</div></figure>"
    )


def mistake_cards(record: EvaluationRecord, one: MethodRecord) -> str:
    """The most confident mistakes as pictures."""
    if not one.mistakes:
        return f'<p class="absent">{escape(one.model)} makes no mistake on these images.</p>'
    return f'<div class="card shots">{"".join(_mistake(record, shown) for shown in one.mistakes)}</div>'


def _mistake(record: EvaluationRecord, shown: PicturedMistake) -> str:
    mistake = shown.mistake
    if shown.jpeg is None:
        picture = '<div class="gone">not found</div>'
    else:
        data = base64.b64encode(shown.jpeg).decode("ascii")
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(mistake.true)}" loading="lazy">'
    truth = escape(mistake.true) or "<em>unknown class</em>"
    others = "".join(
        f'<span title="{escape(model)}"><i style="background:var(--c{record.color(model)})"></i>{escape(says)}</span>'
        for model, says in shown.others
    )
    return (
        f'<figure title="{escape(shown.title)}">{picture}<figcaption><b>{truth}</b>'
        f'<span class="said">“{escape(mistake.predicted)}” {percent(mistake.confidence, digits=0)} %</span>{others}'
        "</figcaption></figure>"
    )


def _figure_cell(estimate: Estimate | None, best: float, compared: int) -> str:
    if estimate is None:
        return '<td class="number">–</td>'
    text = percent(estimate.value, digits=2)
    strong = f"<b>{text}</b>" if compared > 1 and estimate.value == best else text
    return f'<td class="number">{strong} <small>{_interval(estimate)}</small></td>'


def _interval(estimate: Estimate) -> str:
    return f"{percent(estimate.low)}–{percent(estimate.high)}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _calibration_value(name: str, value: float) -> str:
    return f"{value:.3f}" if name in _NO_PERCENT else f"{percent(value)} %"


def _bounds(name: str, estimate: Estimate) -> str:
    low, high = (_calibration_value(name, bound) for bound in estimate[1:])
    return f"95 % interval {low} to {high}"


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def _at(share: float) -> int:
    return round(_SIDE * share)
