"""Cross-entropy between teacher assignments and student scores, lean enough for 131,072 prototypes.

`sum_k t_k * log_softmax(s / T)_k` needs neither a stored log-softmax nor a product of that size: the forward pass keeps
one number a row, the backward pass rebuilds the softmax from the scores, a chunk of rows at a time. Arithmetic is
float32 whatever the scores are stored in.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["assignment_cross_entropy", "log_softmax_cross_entropy"]

# Rows are worked on in chunks of about this many numbers, so that temporaries stay in the cache of a CPU.
_CHUNK = 1 << 20


def assignment_cross_entropy(scores: Tensor, assignments: Tensor, temperature: float, row_weights: Tensor) -> Tensor:
    """`- sum_i w_i sum_k a_ik log_softmax(s_i / T)_k` of scores `[S, K]`, assignments `[S, K]`, weights `[S]` -> `[]`.

    Rows of the assignments need not sum to 1. Gradients reach the scores alone.
    """
    loss: Tensor = _CrossEntropy.apply(scores, assignments, temperature, row_weights)
    return loss


def log_softmax_cross_entropy(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """The plain formula `[..., K]`, `[..., K]` -> `[...]`, for comparison and for double backward."""
    return -(assignments.float() * (scores.float() / temperature).log_softmax(dim=-1)).sum(dim=-1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, assignments: Tensor, temperature: float, row_weights: Tensor) -> Tensor:
        row_weights = row_weights.float()
        per_row = torch.empty(scores.shape[0], device=scores.device)
        log_mass = torch.empty_like(per_row)  # log sum_k exp(s_k / T)
        for rows in _chunks(scores):
            logits = scores[rows].float() / temperature
            target = assignments[rows].float()
            log_mass[rows] = logits.logsumexp(dim=-1)
            per_row[rows] = log_mass[rows] * target.sum(dim=-1) - (logits * target).sum(dim=-1)
        ctx.save_for_backward(scores, assignments, row_weights, log_mass)
        ctx.temperature = temperature
        return (per_row * row_weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        scores, assignments, row_weights, log_mass = ctx.saved_tensors
        row_scale = (gradients[0] / ctx.temperature) * row_weights
        gradient = torch.empty_like(scores)
        for rows in _chunks(scores):
            target = assignments[rows].float()
            softmax = (scores[rows].float() / ctx.temperature).sub_(log_mass[rows, None]).exp_()
            softmax.mul_(target.sum(dim=-1, keepdim=True)).sub_(target).mul_(row_scale[rows, None])
            gradient[rows] = softmax
        return gradient, None, None, None


def _chunks(scores: Tensor) -> list[slice]:
    size = max(1, _CHUNK // max(1, scores.shape[1]))
    return [slice(start, start + size) for start in range(0, scores.shape[0], size)]
