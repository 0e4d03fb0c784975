"""Is the training healthy? Measures without labels, taken from the teacher on the batch of a logged step.

They cost one forward pass of the teacher's global crops and two small eigenvalue problems, at every hundredth step by
default: well below one per cent of the time. They draw no random numbers and change nothing, so that a training with
them equals one without, bit for bit.
"""

import time
from typing import cast

import torch
from torch import Tensor

from dinov2.configs import Config
from dinov2.data.collate import CropBatch
from dinov2.engine.parallel import autocast
from dinov2.errors import DataError
from dinov2.features.health import (
    assignment_health,
    effective_rank,
    nearest_distances,
    patch_health,
    rank_me,
    spread,
)
from dinov2.loss.dino_clstoken_loss import DINOLoss
from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
from dinov2.models.vision_transformer import DinoVisionTransformer
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
def training_health(training: Training, batch: CropBatch, teacher_temp: float) -> dict[str, float]:
    """`health_*` entries of a metrics row (see docs/doctor.md); empty where the network's output is not finite.

    Waits for the device. Over several processes all must call it; each gets the figures of its own part of the batch.
    """
    began = time.perf_counter()
    try:
        found = _measures(training, batch, teacher_temp)
    except (DataError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # not finite: the run's guard ends it
        return {}
    return {
        **{f"health_{name}": value for name, value in found.items()},
        "health_time": time.perf_counter() - began,
    }


def _measures(training: Training, batch: CropBatch, teacher_temp: float) -> dict[str, float]:
    ssl = training.ssl
    teacher = cast(DinoVisionTransformer, ssl.teacher["backbone"])
    with autocast(training.device, training.precision):
        features = teacher.forward_features(batch.global_crops)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]  # [G*B, D], [G*B, N, D]
        cls_scores = ssl.teacher["dino_head"](cls) if ssl.dino_weight else None
        patch_scores = None
        if ssl.ibot_weight:
            head = ssl.teacher["ibot_head" if ssl.separate_ibot_head else "dino_head"]
            patch_scores = head(patches.flatten(0, 1).index_select(0, batch.masked_indices))
    # First what all processes do together, whatever a part of the batch is like: a process that has found values that
    # are not finite, or has no masked patch, must not leave the others waiting.
    of_cls = of_patches = None
    if cls_scores is not None:
        of_cls = _assigned(ssl.dino_loss, ssl.centering, cls_scores, teacher_temp)
    if patch_scores is not None:
        of_patches = _assigned(ssl.ibot_patch_loss, ssl.centering, patch_scores, teacher_temp)
    found = _of_features(_for_float64(cls), _for_float64(patches))
    grid = (batch.global_crops.shape[-2] // teacher.patch_size, batch.global_crops.shape[-1] // teacher.patch_size)
    before_norm = features["x_prenorm"][:, 1 + teacher.num_register_tokens :]
    found |= patch_health(patches.unflatten(1, grid), before_norm.unflatten(1, grid))
    if of_cls is not None:
        found |= assignment_health(_for_float64(of_cls))
    if of_patches is not None and len(of_patches):
        found |= {f"patch_{name}": value for name, value in assignment_health(_for_float64(of_patches)).items()}
    return found


def _of_features(cls: Tensor, patches: Tensor) -> dict[str, float]:
    """Spread and ranks of class tokens `[G*B, D]` and patches `[G*B, N, D]`."""
    rows = patches.flatten(0, 1)
    rows = rows[:: max(1, -(-len(rows) // _PATCH_ROWS))]
    found = {
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
        found |= {
            "koleo_distance": nearest.mean().item(),
            "duplicates": (nearest < _DUPLICATE).double().mean().item(),
        }
    return found


def _assigned(loss: DINOLoss | iBOTPatchLoss, centering: str, scores: Tensor, temperature: float) -> Tensor:
    """Assignments `[S, K]` as the training makes them, without moving the center."""
    if centering == "sinkhorn_knopp":
        return loss.sinkhorn_knopp_teacher(scores, temperature)
    return loss.softmax_center_teacher(scores, temperature)


def _for_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 exists: Apple's GPUs have none."""
    return tensor.float().cpu() if tensor.device.type == "mps" else tensor.float()
