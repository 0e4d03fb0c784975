"""Measures that need no labels: of a feature matrix, of the teacher's assignments, of the patches within an image."""

from dinov2.features.health.assignments import assignment_health
from dinov2.features.health.patches import patch_health
from dinov2.features.health.spread import (
    effective_rank,
    feature_health,
    nearest_distances,
    participation_ratio,
    rank_me,
    spread,
    uniformity,
)

__all__ = [
    "assignment_health",
    "effective_rank",
    "feature_health",
    "nearest_distances",
    "participation_ratio",
    "patch_health",
    "rank_me",
    "spread",
    "uniformity",
]
