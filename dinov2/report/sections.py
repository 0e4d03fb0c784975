"""The sections of a report: each a function from what a run holds to HTML, or to a sentence that says what is absent.

Those that are tables live in `dinov2.report.tables`.
"""

import base64
import math
from collections.abc import Sequence
from html import escape

from dinov2.report.charts import Bar, Level, Series, bar_chart, line_chart, smooth
from dinov2.report.health_section import evaluation_curves, health
from dinov2.report.sources import Picture, RunRecord
from dinov2.report.tables import absent, configuration, files, results, versions

__all__ = ["SECTIONS", "facts"]

_MOST_STRIPS = 10

_LOSS_TERMS = {
    "dino_global_crops_loss": ("DINO, global crops", 1),
    "dino_local_crops_loss": ("DINO, local crops", 2),
    "ibot_loss": ("iBOT, masked patches", 3),
    "koleo_loss": ("KoLeo, spread of the class tokens", 4),
}
_BASELINES = {"raw_pixels": ("raw pixels", 0), "untrained": ("untrained", 5)}


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """The few facts that identify a run, (name, value), for the head of the page."""
    found: list[tuple[str, str]] = []
    student, train, crops = (run.config.get(key) or {} for key in ("student", "train", "crops"))
    if student.get("arch"):
        found.append(("model", f"{student['arch']}, patch {student.get('patch_size', '?')}"))
    if train.get("dataset_path"):
        found.append(("data", str(train["dataset_path"])))
    if train.get("batch_size_per_gpu"):
        found.append(("batch", str(train["batch_size_per_gpu"])))
    if crops.get("global_crops_size"):
        found.append(("crops", f"{crops['global_crops_size']} px and {crops.get('local_crops_size', '?')} px"))
    iterations = [points[-1][0] for points in run.metrics.values()]
    if iterations:
        found.append(("iterations", f"{int(max(iterations)) + 1:,}"))
    if "seconds" in run.summary:
        found.append(("time", _duration(run.summary["seconds"])))
    return found


def _duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _headline(run: RunRecord) -> str:
    """Accuracy of the trained backbone, large, beside what it has to beat."""
    values = {
        key: run.summary[key] for key in ("trained", *_BASELINES) if math.isfinite(run.summary.get(key, math.nan))
    }
    remark = ""
    if "trained" not in values and run.knn_curve:
        iteration, values["trained"] = run.knn_curve[-1]
        remark = f" The figure is the last one measured during the training, after iteration {int(iteration):,}."
    if "trained" not in values:
        return absent("This run has no evaluation (summary.json or knn_curve.json).")
    trained = values["trained"]
    gains = []
    for key, (name, _) in _BASELINES.items():
        if key in values:
            gain = trained - values[key]
            against = f"an {name} network" if key == "untrained" else name
            kind = "" if gain >= 0 else ' class="loss"'
            gains.append(f"<li><b{kind}>{gain:+.1f} points</b> against {against}</li>")
    bars = [Bar(name.capitalize(), values[key], color) for key, (name, color) in _BASELINES.items() if key in values]
    bars.append(Bar("Trained", trained, 1))
    return (
        f'<div class="card headline"><div><p class="big">{trained:.1f}<small>%</small></p>'
        f'<ul class="gains">{"".join(gains)}</ul></div>{bar_chart(bars)}</div>'
        '<p class="note">Share of validation images whose class a vote of their nearest training images gets right: '
        f"no classifier is trained, the features alone decide.{remark}</p>"
    )


def _accuracy_curve(run: RunRecord) -> str:
    """k-NN accuracy over the training, with the baselines as lines."""
    levels = [Level(name, run.summary[key], color) for key, (name, color) in _BASELINES.items() if key in run.summary]
    chart = line_chart(
        [Series("teacher, top-1", run.knn_curve, 1, "dots")],
        title="k-NN accuracy of the teacher",
        levels=levels,
        scale="linear",
        unit=" %",
        wide=True,
    )
    if len(run.evaluations) > 1 or not run.knn_curve:  # else it would be the same curve again
        chart += evaluation_curves(run.evaluations)
    return f'<div class="grid">{chart}</div>' if chart else absent("No accuracy was measured during this training.")


def _losses(run: RunRecord) -> str:
    """The total loss and each of its terms, as logged and smoothed."""
    if not run.metrics:
        return absent("This run has no training log (training_metrics.json).")
    total = run.metrics.get("total_loss") or run.metrics.get("loss") or []
    cards = [_loss_chart("Total loss", total, color=1, wide=True)]
    unused = []
    for key, (name, color) in _LOSS_TERMS.items():
        points = run.metrics.get(key, [])
        if any(value != 0 for _, value in points):
            cards.append(_loss_chart(name, points, color=color, wide=False))
        else:
            unused.append(name)
    note = f'<p class="note">Not part of this training: {escape("; ".join(unused))}.</p>' if unused else ""
    skipped = (
        f'<p class="note">{run.skipped_steps} steps with a loss or gradient that was not finite were skipped.</p>'
        if run.skipped_steps
        else ""
    )
    body = "".join(cards)
    return (f'<div class="grid">{body}</div>' if body else absent("The training log holds no losses.")) + note + skipped


def _schedules(run: RunRecord) -> str:
    """What was scheduled and how fast it went: learning rate, momentum, temperatures, gradients, throughput."""
    metrics = run.metrics
    waiting = [
        (x, 100 * data / step)
        for (x, data), (_, step) in zip(metrics.get("data_time", []), metrics.get("iter_time", []), strict=False)
        if step > 0
    ]
    speed = metrics.get("images_per_second", [])
    norms = {key: points for key, points in metrics.items() if key.startswith("grad_norm_")}
    names = {key: key.removeprefix("grad_norm_").replace("_", " ") for key in norms}
    charts = [
        line_chart(
            [Series("all layers", metrics.get("lr", []), 1), Series("last layer", metrics.get("last_layer_lr", []), 2)],
            title="Learning rate",
            scale="linear",
        ),
        line_chart([Series("momentum", metrics.get("mom", []), 3)], title="Teacher momentum", scale="linear"),
        line_chart([Series("weight decay", metrics.get("wd", []), 4)], title="Weight decay", scale="linear"),
        line_chart(
            [Series("temperature", metrics.get("teacher_temp", []), 5)], title="Teacher temperature", scale="linear"
        ),
        line_chart(
            [Series(names[key], smooth(points), i) for i, (key, points) in enumerate(norms.items(), start=1)],
            title="Gradient norms before clipping",
        ),
        line_chart(
            [Series("as logged", speed, 1, "faint"), Series("smoothed", smooth(speed), 1)],
            title="Images per second",
            scale="linear",
        ),
        line_chart(
            [Series("as logged", waiting, 2, "faint"), Series("smoothed", smooth(waiting), 2)],
            title="Time spent waiting for data",
            scale="linear",
            unit=" %",
        ),
    ]
    body = "".join(charts)
    return f'<div class="grid">{body}</div>' if body else absent("The training log holds no schedules.")


def _patch_maps(run: RunRecord) -> str:
    """Principal components of patch features as training went on."""
    if not run.pca_strips:
        return absent("No pictures of patch features were drawn during this training.")
    chosen = _evenly(run.pca_strips, _MOST_STRIPS)
    rows = [("images", run.pca_images)] if run.pca_images is not None else []
    rows += [(f"iteration {iteration:,}", picture) for iteration, picture in chosen]
    body = "".join(f"<span>{escape(label)}</span>{_img(picture, label)}" for label, picture in rows if picture)
    return (
        "<p class=lead>Each square is one patch of an image. Its colour shows the three strongest directions in which "
        "the patch features of these images differ, so patches of one colour mean the same to the model.</p>"
        f'<div class="card strips">{body}</div>'
        '<p class="note">The directions of a row are found anew and matched to the row above where they can be: '
        "colours compare strictly along a row and loosely between rows.</p>"
    )


def _gallery(run: RunRecord) -> str:
    """Validation images with their nearest training images."""
    if not run.gallery:
        return absent("No gallery of nearest neighbours was made for this run.")
    rows = []
    for row in run.gallery:
        cells = [_cell(row.query, row.label or "query", "")]
        for picture, label, similarity, correct in row.neighbours:
            kind = "" if correct is None else "right" if correct else "wrong"
            caption = " ".join(filter(None, [label, "" if similarity is None else f"{similarity:.2f}"]))
            cells.append(_cell(picture, caption, kind))
        rows.append(f'<div class="row">{"".join(cells)}</div>')
    judged = [correct for row in run.gallery for *_, correct in row.neighbours if correct is not None]
    share = f" {sum(judged)} of these {len(judged)} neighbours are of the right class." if judged else ""
    return (
        "<p class=lead>On the left an image the model has not seen, then the five training images whose features are "
        f"most similar, with their cosine similarity. Green is the same class, red another.{share}</p>"
        f'<div class="card gallery">{"".join(rows)}</div>'
    )


SECTIONS = (
    ("result", "Result", _headline),
    ("accuracy", "Accuracy", _accuracy_curve),
    ("patches", "Patch features", _patch_maps),
    ("neighbours", "Neighbours", _gallery),
    ("losses", "Losses", _losses),
    ("health", "Health", health),
    ("schedules", "Schedules", _schedules),
    ("figures", "All figures", results),
    ("configuration", "Configuration", configuration),
    ("versions", "Versions", versions),
    ("files", "Files", files),
)
"""(anchor, title, function) of every section, in the order of the page."""


def _loss_chart(title: str, points: Sequence[tuple[float, float]], *, color: int, wide: bool) -> str:
    return line_chart(
        [Series("as logged", points, color, "faint"), Series("smoothed", smooth(points), color)], title=title, wide=wide
    )


def _cell(picture: Picture, caption: str, kind: str) -> str:
    return f'<figure class="{kind}">{_img(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>'


def _img(picture: Picture, alt: str) -> str:
    encoded = base64.b64encode(picture.data).decode("ascii")
    return f'<img src="data:{picture.mime};base64,{encoded}" alt="{escape(alt)}">'


def _evenly(items: Sequence[tuple[int, Picture]], most: int) -> list[tuple[int, Picture]]:
    """At most `most` items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
