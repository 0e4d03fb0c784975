"""Curves of a run's health without labels, and of every evaluation on the way, for its report."""

from collections.abc import Mapping, Sequence

from dinov2.analysis.patch_maps import HIGH_NORM_FACTOR
from dinov2.report.charts import Level, Point, Series, line_chart
from dinov2.report.sources import RunRecord
from dinov2.report.tables import absent

__all__ = ["evaluation_curves", "health"]

_COLORS = 5  # of the theme

# A chart a line: its title, and the measures drawn in it (the key behind `health_`) with their names.
_CHARTS: Mapping[str, Mapping[str, str]] = {
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


def health(run: RunRecord) -> str:
    """What the teacher's assignments and features look like without labels (`health_*` in the log)."""
    found = {key.removeprefix("health_"): points for key, points in run.metrics.items() if key.startswith("health_")}
    if not found:
        return absent("Health was not measured during this training (evaluation.health_period_iterations).")

    charts = [
        line_chart(
            [Series(name, found.get(key, []), color) for color, (key, name) in enumerate(curves.items(), start=1)],
            title=title,
            levels=_bound(found.get("rank_bound", [])) if "rank" in curves else [],
            scale="linear",
        )
        for title, curves in _CHARTS.items()
    ]
    charts.append(
        line_chart(
            [
                Series(
                    f"above {HIGH_NORM_FACTOR:g} medians",
                    [(x, 100 * y) for x, y in found.get("high_norm_share", [])],
                    1,
                )
            ],
            title="Patches of high norm",
            scale="linear",
            unit=" %",
        )
    )
    return (
        "<p class=lead>None of this needs labels. The entropy of a single crop's assignment should lie well below that "
        "of the mean one: then the teacher tells images apart. Both high is a teacher that is sure of nothing, both "
        "near zero one that says the same of every image.</p>"
        f'<div class="grid">{"".join(charts)}</div>'
    )


def evaluation_curves(curves: Mapping[str, Sequence[Point]]) -> str:
    """All accuracies over the training in one chart, or "" where there are none."""
    return line_chart(
        [Series(name, points, 1 + i % _COLORS, "dots") for i, (name, points) in enumerate(curves.items())],
        title="Accuracy of the teacher, by evaluation",
        scale="linear",
        unit=" %",
        wide=True,
    )


def _bound(points: Sequence[Point]) -> list[Level]:
    return [Level("most that a batch's class tokens can have", points[-1][1])] if points else []
