"""What the teacher tells the student: how sure it is of each crop, and how much it tells different crops apart.

Two entropies say most. The mean entropy of single rows is `ln K` for a teacher that is sure of nothing and 0 for one
that is sure of everything. The entropy of the mean row is `ln K` when all prototypes are used alike and 0 when every
crop gets the same one. Healthy training has the first well below the second.
"""

import math

import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = ["assignment_health"]


@torch.no_grad()
def assignment_health(assignments: Tensor) -> dict[str, float]:
    """Measures of assignments `[S, K]` whose rows sum to 1; entropies in nats.

    `teacher_entropy` (0 to ln K): mean entropy of a row. `marginal_entropy` (0 to ln K): entropy of the mean row.
    `kl_to_uniform`: ln K less the latter, the divergence of the mean row from the uniform one. `prototype_usage`
    (above 0, at most 1): different prototypes that are some row's highest, in parts of the most that S rows could have.

    Raises `DataError` when there is no row, or one that is not finite.
    """
    if assignments.ndim != 2 or assignments.shape[0] == 0:
        raise DataError(f"assignments must be [S, K] with at least one row, got shape {list(assignments.shape)}")
    if not bool(assignments.isfinite().all()):
        raise DataError("the assignments hold NaN or infinite values; the training has diverged")
    rows = assignments.double()
    n_rows, n_prototypes = rows.shape
    marginal = _entropy(rows.mean(dim=0)).item()
    used = rows.argmax(dim=1).unique().numel()
    return {
        "teacher_entropy": _entropy(rows).mean().item(),
        "marginal_entropy": marginal,
        "kl_to_uniform": math.log(n_prototypes) - marginal,
        "prototype_usage": used / min(n_rows, n_prototypes),
    }


def _entropy(rows: Tensor) -> Tensor:  # [..., K] -> [...]
    return torch.special.entr(rows).sum(dim=-1)
