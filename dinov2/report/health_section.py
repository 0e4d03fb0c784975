"""Curves of a run's health without labels, and of every evaluation on the way, for its report."""

from collections.abc import Mapping, Sequence

from dinov2.report.charts import Level, Point, Series, line_chart
from dinov2.report.sources import RunRecord
from dinov2.report.tables import absent

__all__ = ["evaluation_curves", "health"]

_COLORS = 5  # of the theme


def health(run: RunRecord) -> str:
    """What the teacher's assignments and features look like without labels (`health_*` in the log)."""
    found = {key.removeprefix("health_"): points for key, points in run.metrics.items() if key.startswith("health_")}
    if not found:
        return absent("Health was not measured during this training (evaluation.health_period_iterations).")

    def series(**names: str) -> list[Series]:
        return [Series(name, found.get(key, []), color) for color, (key, name) in enumerate(names.items(), start=1)]

    charts = [
        line_chart(
            series(teacher_entropy="of a crop's assignment", marginal_entropy="of the batch's mean assignment"),
            title="Entropy of the teacher's assignments, class tokens (nats)",
            scale="linear",
        ),
        line_chart(
            series(patch_teacher_entropy="of a patch's assignment", patch_marginal_entropy="of the mean assignment"),
            title="Entropy of the teacher's assignments, patches (nats)",
            scale="linear",
        ),
        line_chart(
            series(prototype_usage="class tokens", patch_prototype_usage="patches"),
            title="Prototypes in use, of those a batch could use",
            scale="linear",
        ),
        line_chart(
            series(kl_to_uniform="class tokens", patch_kl_to_uniform="patches"),
            title="Divergence of the mean assignment from the uniform one (nats)",
            scale="linear",
        ),
        line_chart(
            series(rank="class tokens", rank_me="class tokens, not centred (RankMe)", patch_rank="patches"),
            title="Effective rank of the features",
            levels=_bound(found.get("rank_bound", [])),
            scale="linear",
        ),
        line_chart(
            series(koleo_distance="to the nearest other image", spread="to the mean direction"),
            title="Distances of class tokens on the sphere",
            scale="linear",
        ),
        line_chart(
            series(near_similarity="neighbours", far_similarity="half the image apart"),
            title="Similarity of patches of one image",
            scale="linear",
        ),
        line_chart(
            [Series("above three medians", [(x, 100 * y) for x, y in found.get("high_norm_share", [])], 1)],
            title="Patches of high norm",
            scale="linear",
            unit=" %",
        ),
    ]
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
