"""The report of a training: one HTML page from the folder of a run, that opens anywhere and needs no other file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinov2.analysis.patch_maps import HIGH_NORM_FACTOR
from dinov2.eval.result import environment
from dinov2.report.charts import Level, LineChart, Point, Series, line_chart, smooth
from dinov2.report.render import render
from dinov2.report.run_record import RunRecord, read_run
from dinov2.whole_files import write_text

__all__ = ["training_report", "write_report"]

_MOST_STRIPS = 10
_COLORS = 5  # of the palette

_LOSS_TERMS = {
    "dino_global_crops_loss": ("DINO, global crops", 1),
    "dino_local_crops_loss": ("DINO, local crops", 2),
    "ibot_loss": ("iBOT, masked patches", 3),
    "koleo_loss": ("KoLeo, spread of the class tokens", 4),
}
_BASELINES = {"raw_pixels": ("raw pixels", 0), "untrained": ("untrained", 5)}

# A chart a line: its title, and the measures drawn in it (the key behind `health_`) with their names.
_HEALTH: Mapping[str, Mapping[str, str]] = {
    "Entropy of the teacher's assignments, class tokens (nats)": {
        "teacher_entropy": "of a crop's assignment",
        "marginal_entropy": "of the batch's mean assignment",
    },
    "Entropy of the teacher's assignments, patches (nats)": {
        "patch_teacher_entropy": "of a patch's assignment",
        "patch_marginal_entropy": "of the mean assignment",
    },
    "Prototypes in use, of those a batch could use": {
        "prototype_usage": "class tokens",
        "patch_prototype_usage": "patches",
    },
    "Divergence of the mean assignment from the uniform one (nats)": {
        "kl_to_uniform": "class tokens",
        "patch_kl_to_uniform": "patches",
    },
    "Effective rank of the features": {
        "rank": "class tokens",
        "rank_me": "class tokens, not centred (RankMe)",
        "patch_rank": "patches",
    },
    "Distances of class tokens on the sphere": {
        "koleo_distance": "to the nearest other image",
        "spread": "to the mean direction",
    },
    "Similarity of patches of one image": {
        "near_similarity": "neighbours",
        "far_similarity": "half the image apart",
    },
}


def write_report(run_folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Write the report of a run and return its path, by default `report.html` in the run's folder.

    Every part of a run is optional; the page says in words what is absent. Raises `DataError` when the folder holds
    nothing of a run.
    """
    page = training_report(read_run(run_folder))
    return write_text(Path(run_folder) / "report.html" if out is None else out, page)


def training_report(run: RunRecord) -> str:
    """The report as text."""
    return render(
        "training.html.jinja",
        run=run,
        facts=_facts(run),
        result=_result(run),
        accuracy=_drawn(_accuracy(run)),
        strips=_strips(run),
        judged=[shot.kind for row in run.gallery for shot in row.shots if shot.kind in ("right", "wrong")],
        losses=_drawn(_losses(run)),
        unused=[name for key, (name, _) in _LOSS_TERMS.items() if not _is_used(run, key)],
        health=_drawn(_health(run)),
        schedules=_drawn(_schedules(run)),
        configuration=[(section, _flat(content)) for section, content in run.config.items()],
        versions=run.environment or environment(),
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """The few facts that identify a run, for the head of the page."""
    student, train, crops = (run.config.get(key) or {} for key in ("student", "train", "crops"))
    iterations = [points[-1][0] for points in run.metrics.values()]
    facts = {
        "model": student.get("arch") and f"{student['arch']}, patch {student.get('patch_size', '?')}",
        "data": train.get("dataset_path"),
        "batch": train.get("batch_size_per_gpu"),
        "crops": crops.get("global_crops_size")
        and f"{crops['global_crops_size']} px and {crops.get('local_crops_size', '?')} px",
        "iterations": iterations and f"{int(max(iterations)) + 1:,}",
        "time": "seconds" in run.summary and _duration(run.summary["seconds"]),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _result(run: RunRecord) -> dict[str, object] | None:
    """Accuracy of the trained backbone, beside what it has to beat; None where it was never evaluated."""
    values = {
        key: run.summary[key] for key in ("trained", *_BASELINES) if math.isfinite(run.summary.get(key, math.nan))
    }
    measured_at = None
    if "trained" not in values and run.knn_curve:
        measured_at, values["trained"] = run.knn_curve[-1]
    if "trained" not in values:
        return None
    baselines = [(key, name, color) for key, (name, color) in _BASELINES.items() if key in values]
    return {
        "trained": values["trained"],
        "measured_at": measured_at,
        "gains": [
            (values["trained"] - values[key], f"an {name} network" if key == "untrained" else name)
            for key, name, _ in baselines
        ],
        "bars": [
            *((name.capitalize(), values[key], color) for key, name, color in baselines),
            ("Trained", values["trained"], 1),
        ],
    }


def _accuracy(run: RunRecord) -> list[LineChart | None]:
    levels = [Level(name, run.summary[key], color) for key, (name, color) in _BASELINES.items() if key in run.summary]
    charts = [
        line_chart(
            [Series("teacher, top-1", run.knn_curve, 1, "dots")],
            title="k-NN accuracy of the teacher",
            levels=levels,
            scale="linear",
            unit=" %",
            wide=True,
        )
    ]
    if len(run.evaluations) > 1 or not run.knn_curve:  # else it would be the same curve again
        curves = [
            Series(name, points, 1 + i % _COLORS, "dots") for i, (name, points) in enumerate(run.evaluations.items())
        ]
        title = "Accuracy of the teacher, by evaluation"
        charts.append(line_chart(curves, title=title, scale="linear", unit=" %", wide=True))
    return charts


def _losses(run: RunRecord) -> list[LineChart | None]:
    total = run.metrics.get("total_loss") or run.metrics.get("loss") or []
    charts = [line_chart(_smoothed(total), title="Total loss", wide=True)]
    for key, (name, color) in _LOSS_TERMS.items():
        if _is_used(run, key):
            charts.append(line_chart(_smoothed(run.metrics[key], color), title=name))
    return charts


def _is_used(run: RunRecord, key: str) -> bool:
    return any(value != 0 for _, value in run.metrics.get(key, []))


def _health(run: RunRecord) -> list[LineChart | None]:
    """Measures of the teacher's assignments and features that need no labels (`health_*` in the log)."""
    measures = {key.removeprefix("health_"): values for key, values in run.metrics.items() if key.startswith("health_")}
    bound = [Level("most that a batch's class tokens can have", y) for _, y in measures.get("rank_bound", [])[-1:]]
    charts = [
        line_chart(
            [Series(name, measures.get(key, []), color) for color, (key, name) in enumerate(curves.items(), start=1)],
            title=title,
            levels=bound if "rank" in curves else [],
            scale="linear",
        )
        for title, curves in _HEALTH.items()
    ]
    high = Series(f"above {HIGH_NORM_FACTOR:g} medians", [(x, 100 * y) for x, y in measures.get("high_norm_share", [])])
    return [*charts, line_chart([high], title="Patches of high norm", scale="linear", unit=" %")]


def _schedules(run: RunRecord) -> list[LineChart | None]:
    """Schedules and speed: learning rate, momentum, temperatures, gradients, throughput."""
    metrics = run.metrics
    times = zip(metrics.get("data_time", []), metrics.get("iter_time", []), strict=False)
    waiting = [(x, 100 * data / step) for (x, data), (_, step) in times if step > 0]
    norms = [(key, points) for key, points in metrics.items() if key.startswith("grad_norm_")]
    gradients = [
        Series(key.removeprefix("grad_norm_").replace("_", " "), smooth(points), i)
        for i, (key, points) in enumerate(norms, start=1)
    ]

    def linear(title: str, *series: Series, unit: str = "") -> LineChart | None:
        return line_chart(series, title=title, scale="linear", unit=unit)

    rates = [Series("all layers", metrics.get("lr", [])), Series("last layer", metrics.get("last_layer_lr", []), 2)]
    return [
        linear("Learning rate", *rates),
        linear("Teacher momentum", Series("momentum", metrics.get("mom", []), 3)),
        linear("Weight decay", Series("weight decay", metrics.get("wd", []), 4)),
        linear("Teacher temperature", Series("temperature", metrics.get("teacher_temp", []), 5)),
        line_chart(gradients, title="Gradient norms before clipping"),
        linear("Images per second", *_smoothed(metrics.get("images_per_second", []))),
        linear("Time spent waiting for data", *_smoothed(waiting, 2), unit=" %"),
    ]


def _smoothed(points: Sequence[Point], color: int = 1) -> list[Series]:
    return [Series("as logged", points, color, "faint"), Series("smoothed", smooth(points), color)]


def _drawn(charts: Sequence[LineChart | None]) -> list[LineChart]:
    return [chart for chart in charts if chart is not None]


def _strips(run: RunRecord) -> list[tuple[str, bytes]]:
    """Principal components of patch features as training went on, at most `_MOST_STRIPS`, at even distances."""
    n = len(run.pca_strips)
    rows = range(n) if n <= _MOST_STRIPS else [round(i * (n - 1) / (_MOST_STRIPS - 1)) for i in range(_MOST_STRIPS)]
    strips = [(f"iteration {run.pca_strips[row][0]:,}", run.pca_strips[row][1]) for row in rows]
    return [("images", run.pca_images), *strips] if strips and run.pca_images is not None else strips


def _flat(content: Mapping[object, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, bool):
            flat[f"{prefix}{key}"] = str(value).lower()
        else:
            flat[f"{prefix}{key}"] = "–" if value in (None, "") else str(value)
    return flat
