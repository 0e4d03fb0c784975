"""Reports of a training: the summary before it, rows of metrics, and health measures without labels.

Health costs one forward pass of the teacher's global crops and two small eigenvalue problems, at every hundredth step
by default: well below one per cent of the time. It draws no random numbers and changes nothing, so that a training with
it equals one without, bit for bit.
"""

import time
from typing import Any

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
from dinov2.distributed import all_reduce_sum, get_global_size
from dinov2.engine.optim import StepOutcome
from dinov2.engine.progress import ProgressFigures
from dinov2.engine.schedules import Hyper
from dinov2.errors import DataError
from dinov2.train.objective import LossTerms
from dinov2.train.setup import Training

__all__ = ["health_is_due", "metrics_row", "summary", "training_health"]

_GIB = 2**30
# Rows of patches for the effective rank: enough for any width, few enough to cost nothing.
_PATCH_ROWS = 2048
_DUPLICATE = 1e-4


def summary(training: Training) -> str:
    """Model, data, batch, steps, what an epoch means here, precision and where things are written."""
    cfg = training.cfg
    parts = training.objective.trained_parts()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    parameters = sizes["backbone"]
    heads = sum(sizes.values()) - parameters
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    precision = (
        "float32" if training.precision is None else f"{str(training.precision).removeprefix('torch.')} autocast"
    )
    lines = [
        f"model      {cfg.student.arch}, patch {cfg.student.patch_size}, {parameters / 1e6:.1f} M parameters, "
        f"{cfg.student.num_register_tokens} registers; heads {heads / 1e6:.1f} M, "
        f"{cfg.dino.head_n_prototypes} prototypes",
        f"data       {len(training.dataset):,} images from {cfg.train.dataset_path}",
        f"crops      2 of {cfg.crops.global_crops_size} px, {cfg.crops.local_crops_number} of "
        f"{cfg.crops.local_crops_size} px",
        f"batch      {training.global_batch} images a step{_processes()}",
        f"steps      {training.total:,} = {cfg.optim.epochs} epochs of {epoch:,} steps (an epoch is a fixed number of "
        f"steps, not a pass over the data); {training.passes:,.1f} passes over the images in all",
        f"objective  {_objective(cfg)}",
        f"precision  {precision} on {training.device}",
        f"memory     about {training.memory / _GIB:.1f} GiB, estimated from the architecture"
        + (f"; {training.free_memory / _GIB:.1f} GiB are free" if training.free_memory is not None else ""),
        f"output     {training.run.path}",
    ]
    if training.first:
        lines.append(f"resuming   from step {training.first:,}")
    if training.last < training.total:
        lines.append(f"stopping   after step {training.last:,}, as asked; schedules run to {training.total:,}")
    return "\n".join(lines)


def _processes() -> str:
    return f" on {get_global_size()} processes" if get_global_size() > 1 else ""


def _objective(cfg: Config) -> str:
    weights = {"DINO": cfg.dino.loss_weight, "iBOT": cfg.ibot.loss_weight, "KoLeo": cfg.dino.koleo_loss_weight}
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight) + f", {cfg.train.centering}"


def metrics_row(
    training: Training, step: int, losses: LossTerms, hyper: Hyper, outcome: StepOutcome, figures: ProgressFigures
) -> dict[str, Any]:
    """One row of `training_metrics.json`: the release's keys and meanings first, then ours.

    Losses are those of this step, averaged over the processes; `total_loss` is the release's sum of the logged terms,
    `loss` what is optimised. Waits for the device.
    """
    terms = losses.logged
    values = torch.stack([losses.total.detach().float(), *(term.float() for term in terms.values())])
    mean = (all_reduce_sum(values) / get_global_size()).tolist()
    by_name = dict(zip(terms, mean[1:], strict=True))
    return {
        "iteration": step,
        "iter_time": figures.iter_time,
        "data_time": figures.data_time,
        "lr": hyper.lr,
        "wd": hyper.weight_decay,
        "mom": hyper.momentum,
        "last_layer_lr": hyper.last_layer_lr,
        "current_batch_size": training.cfg.train.batch_size_per_gpu,
        "total_loss": sum(by_name.values()),
        **by_name,
        "loss": mean[0],
        "teacher_temp": hyper.teacher_temp,
        **{f"grad_norm_{part}": norm.item() for part, norm in outcome.grad_norms.items()},
        "images_per_second": figures.images_per_second,
    }


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
