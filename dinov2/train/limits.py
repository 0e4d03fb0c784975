"""Memory estimate of a training, and limits against runs that are started by mistake.

The estimate counts what autograd keeps of every block, the scores of the heads, and weights with their gradients, their
two moments and the teacher. docs/benchmarks.md compares it with measured peaks.
"""

from typing import Any

import torch
from torch import nn

from dinov2.configs import Config

__all__ = ["BASE_MEMORY", "estimated_memory", "excesses"]

BASE_MEMORY = int(0.65 * 2**30)
"""Bytes that Python and its libraries hold before a model is built."""

_LARGEST_SHARE = 0.7
_MOST_PASSES = 1000
_GIB = 2**30
# Bytes a parameter: student, gradient, two moments, teacher, each float32.
_OF_PARAMETER = 20
# Bytes of a kept number; in half precision norms and residuals stay float32.
_OF_NUMBER = {None: 4.0, torch.bfloat16: 2.6, torch.float16: 2.6}


def estimated_memory(cfg: Config, student: nn.ModuleDict, precision: torch.dtype | None) -> int:
    """Bytes at the peak of a training step of one process; `student` may be on the meta device."""
    backbone: Any = student["backbone"]
    crops, batch = cfg.crops, cfg.train.batch_size_per_gpu
    patch, extra = cfg.student.patch_size, 1 + cfg.student.num_register_tokens
    patches_global, patches_local = ((side // patch) ** 2 for side in (crops.global_crops_size, crops.local_crops_size))
    tokens = batch * (2 * (extra + patches_global) + crops.local_crops_number * (extra + patches_local))

    # Kept a token and block: two norms and their inputs, q, k, v, attention, two scaled branches; and the hidden layer
    # before and after its activation, which SwiGLU keeps four times.
    hidden = 10.7 if "swiglu" in cfg.student.ffn_layer else 2 * cfg.student.mlp_ratio
    rate = cfg.student.drop_path_rate * (1 if cfg.student.drop_path_uniform else 0.5)
    kept_share = 1 - rate if rate > 0.1 else 1.0
    activations = tokens * kept_share * backbone.n_blocks * (10 + hidden) * backbone.embed_dim

    masked = 0.0
    if cfg.ibot.loss_weight:
        low, high = cfg.ibot.mask_ratio_min_max
        masked = 2 * batch * patches_global * cfg.ibot.mask_sample_probability * (low + high) / 2
    of_patches = cfg.ibot if cfg.ibot.separate_head else cfg.dino
    # Scores of the student four times (scores, divided by the temperature, their logarithm, the gradient), of the
    # teacher twice; float32 whatever the precision.
    scores = 1.0 * batch * (4 * (2 + crops.local_crops_number) + 2 * 2) * cfg.dino.head_n_prototypes
    scores += masked * (4 + 2) * of_patches.head_n_prototypes

    parameters = sum(parameter.numel() for parameter in student.parameters())
    return int(BASE_MEMORY + parameters * _OF_PARAMETER + activations * _OF_NUMBER[precision] + scores * 4)


def excesses(cfg: Config, *, memory: int, free: int | None, passes: float, n_images: int, steps: int) -> str:
    """Reasons why a training exceeds the limits, with keys to change; "" where it does not."""
    reasons = []
    needed = max(0, memory - BASE_MEMORY)  # this process holds the base already
    if free is not None and needed > _LARGEST_SHARE * free:
        reasons.append(
            f"it would take about {memory / _GIB:.1f} GiB of memory, and {free / _GIB:.1f} GiB are free (choose a "
            "preset, such as --preset cifar10, or a smaller student.arch, train.batch_size_per_gpu or "
            "dino.head_n_prototypes)"
        )
    if passes > _MOST_PASSES:
        now = cfg.train.OFFICIAL_EPOCH_LENGTH
        length = int(now * _MOST_PASSES / passes)
        remedy = (
            f"train.OFFICIAL_EPOCH_LENGTH={length} makes it about {passes * length / now:,.0f}"
            if length
            else "choose smaller optim.epochs, train.OFFICIAL_EPOCH_LENGTH and train.batch_size_per_gpu"
        )
        reasons.append(f"its {steps:,} steps are {passes:,.0f} passes over {n_images:,} images ({remedy})")
    return " and ".join(reasons)
