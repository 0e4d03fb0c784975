"""Sinkhorn-Knopp: teacher scores to assignments that give all prototypes about the same mass (arXiv 2006.09882)."""

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_max, all_reduce_sum

__all__ = ["sinkhorn_knopp"]


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Scores `[S, K]` of this process -> assignments `[S, K]`, float32, rows sum to 1.

    Sums over samples run over all processes, which may hold different numbers of rows, or none.
    """
    # One scalar for all entries and processes is taken off before the exponential, or scores beyond 88 * temperature
    # would overflow; the normalisation cancels it.
    logits = scores.float() / temperature
    peak = logits.amax() if logits.numel() else torch.full((), -torch.inf, device=scores.device)
    mass = torch.exp(logits - all_reduce_max(peak))
    n_rows = all_reduce_sum(torch.tensor(float(scores.shape[0]), device=scores.device))
    n_prototypes = scores.shape[1]
    mass = mass / all_reduce_sum(mass.sum())
    for _ in range(n_iterations):
        mass = mass / (all_reduce_sum(mass.sum(dim=0, keepdim=True)) * n_prototypes)  # every prototype weighs the same
        mass = mass / (mass.sum(dim=1, keepdim=True) * n_rows)  # every row as well
    return mass * n_rows
