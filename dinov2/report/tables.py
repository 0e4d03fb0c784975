"""The sections of a report that are tables: figures, configuration, versions, files."""

from html import escape
from typing import Any

from dinov2.eval.result import Result, environment
from dinov2.report.sources import RunRecord

__all__ = ["absent", "configuration", "files", "results", "versions"]

_MOST_FILES = 50


def results(run: RunRecord) -> str:
    """All evaluated figures with their intervals."""
    if not run.results:
        return absent("No evaluation has written its figures here (results_eval_knn.json).")
    rows = "".join(_result_row(row) for row in run.results)
    notes = dict.fromkeys(note for row in run.results for note in row.notes)
    return (
        '<div class="card scroll"><table><tr><th>task</th><th>data</th><th>k</th><th>metric</th><th>value</th>'
        f"<th>95 % interval</th><th>images</th></tr>{rows}</table></div>"
        + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    )


def configuration(run: RunRecord) -> str:
    """The whole configuration, a fold for each section."""
    if not run.config:
        return absent("This run has no configuration (config.yaml).")
    folds, single = [], {}
    for section, content in run.config.items():
        if isinstance(content, dict) and content:
            flat = _flat(content)
            count = f"{len(flat)} key{'s' if len(flat) != 1 else ''}"
            folds.append(f"<details><summary>{escape(section)} <span>{count}</span></summary>{_table(flat)}</details>")
        else:
            single[section] = _value(content)
    if single:
        folds.append(f"<details><summary>other <span>{len(single)} keys</span></summary>{_table(single)}</details>")
    return f'<div class="card">{"".join(folds)}</div>'


def versions(run: RunRecord) -> str:
    """Libraries and hardware, as noted when the figures were made, else as they are now."""
    facts = {key: str(value) for key, value in (run.environment or environment()).items()}
    source = "As noted with the figures." if run.environment else "As they are where this page was written."
    return f'<div class="card">{_table(facts)}</div><p class="note">{source}</p>'


def files(run: RunRecord) -> str:
    """Images that could not be read, and files of the run that this page could not use."""
    parts = []
    if run.unreadable:
        rows = "".join(
            f'<tr><td class="mono">{escape(path)}</td><td>{escape(reason)}</td></tr>'
            for path, reason in run.unreadable[:_MOST_FILES]
        )
        rest = len(run.unreadable) - _MOST_FILES
        more = f'<p class="note">and {rest} more in unreadable_images.json</p>' if rest > 0 else ""
        count = f"{len(run.unreadable)} image{'s' if len(run.unreadable) != 1 else ''}"
        parts.append(
            f"<p>{count} could not be read and {'were' if len(run.unreadable) != 1 else 'was'} replaced by others.</p>"
            f'<div class="card scroll"><table><tr><th>file</th><th>reason</th></tr>{rows}</table></div>{more}'
        )
    else:
        parts.append("<p>All images could be read.</p>" if run.metrics else absent("No image was reported unreadable."))
    parts += [f'<p class="absent">{escape(problem)}</p>' for problem in run.problems]
    return "".join(parts)


def absent(sentence: str) -> str:
    """The sentence that stands where a section has nothing to show."""
    return f'<p class="absent">{escape(sentence)}</p>'


def _result_row(row: Result) -> str:
    sign = " %" if row.unit == "percent" else f" {row.unit}"
    interval = "" if row.ci is None else f"{row.ci[0]:.1f} – {row.ci[1]:.1f}"
    data = " ".join(filter(None, [row.dataset, row.split]))
    n_per_class = row.settings.get("n_per_class", "all")
    task = row.task if n_per_class == "all" else f"{row.task}, {n_per_class} images per class"
    cells = [task, data, "" if row.k is None else str(row.k), row.metric, f"{row.value:.2f}{sign}", interval]
    cells.append("" if row.n is None else f"{row.n:,}")
    return "<tr>" + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells) + "</tr>"


def _table(facts: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="mono">{escape(value)}</td></tr>' for key, value in facts.items()
    )
    return f'<table class="settings">{rows}</table>'


def _flat(content: dict[Any, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _value(value)
    return flat


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)
