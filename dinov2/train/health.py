"""Health of a training: measures without labels, taken from the teacher on the batch of a logged step.

They cost one forward pass of the teacher's global crops and two small eigenvalue problems, at every hundredth step by
default: well below one per cent of the time. They draw no random numbers and change nothing, so that a training with
them equals one without, bit for bit.
"""

import time

import torch
from torch import Tensor

from dinov2.analysis.health import (
    assignment_health,
    effective_rank,
    nearest_distances,
    patch_health,
    rank_me,
    spread,
)
from dinov2.configs import Config
from dinov2.data.crops.collate import CropBatch
from dinov2.engine.schedules import Hyper
from dinov2.errors import DataError
from dinov2.train.setup import Training

__all__ = ["health_is_due", "training_health"]

# Rows of patches for the effective rank: enough for any width, few enough to cost nothing.
_PATCH_ROWS = 2048
_DUPLICATE = 1e-4


def health_is_due(cfg: Config, step: int, *, total: int) -> bool:
    """Whether the logged step `step` is the first one at or behind a multiple of the period, or the run's last.

    A function of the step alone, so that a resumed run measures where the unbroken one does.
    """
    period = cfg.evaluation.health_period_iterations
    if not period:
        return False
    return step % period < cfg.train.log_every or step + 1 == total


@torch.no_grad()
def training_health(training: Training, batch: CropBatch, hyper: Hyper) -> dict[str, float]:
    """`health_*` entries of a metrics row (see docs/doctor.md); empty where the network's output is not finite.

    Waits for the device. Over several processes all must call it; each gets the figures of its own part of the batch.
    """
    began = time.perf_counter()
    try:
        measures = _measures(training, batch, hyper)
    except (DataError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # not finite: the run's guard ends it
        return {}
    return {
        **{f"health_{name}": value for name, value in measures.items()},
        "health_time": time.perf_counter() - began,
    }


def _measures(training: Training, batch: CropBatch, hyper: Hyper) -> dict[str, float]:
    # First what all processes do together, whatever a share of the batch is like: a process with values that are not
    # finite, or without a masked patch, must not leave the others waiting.
    probe = training.objective.probe(batch, hyper)
    patches = _for_float64(probe.patches)  # [G*B, h, w, D]
    measures = _feature_measures(_for_float64(probe.cls), patches.flatten(1, 2))
    measures |= patch_health(patches, _for_float64(probe.patches_before_norm))
    if probe.cls_assignments is not None:
        measures |= assignment_health(_for_float64(probe.cls_assignments))
    if probe.patch_assignments is not None and len(probe.patch_assignments):
        of_patches = assignment_health(_for_float64(probe.patch_assignments))
        measures |= {f"patch_{name}": value for name, value in of_patches.items()}
    return measures


def _feature_measures(cls: Tensor, patches: Tensor) -> dict[str, float]:
    """Spread and ranks of class tokens `[G*B, D]` and patches `[G*B, N, D]`."""
    rows = patches.flatten(0, 1)
    rows = rows[:: max(1, -(-len(rows) // _PATCH_ROWS))]
    measures = {
        "rank_me": rank_me(cls),
        "rank": effective_rank(cls),
        "rank_bound": float(min(cls.shape)),
        "patch_rank": effective_rank(rows),
        "patch_rank_bound": float(min(rows.shape)),
        "spread": spread(cls),
    }
    # Within one crop, as KoLeo does: the other crop of the same image is meant to be near.
    first_crop = cls[: len(cls) // 2]
    if len(first_crop) > 1:
        nearest = nearest_distances(first_crop)
        measures |= {
            "koleo_distance": nearest.mean().item(),
            "duplicates": (nearest < _DUPLICATE).double().mean().item(),
        }
    return measures


def _for_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 exists: Apple's GPUs have none."""
    return tensor.float().cpu() if tensor.device.type == "mps" else tensor.float()
