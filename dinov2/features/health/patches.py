"""What the patches of an image say about a backbone: do near ones agree more than far ones, do a few stick out.

A backbone that describes places has patches whose similarity falls with their distance. Where all patches of an image
are alike the dense features are lost; where near and far ones are equally unlike, there was never any structure.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.errors import DataError
from dinov2.features.patch_maps import high_norm_share, high_norm_threshold, patch_norms

__all__ = ["patch_health"]


@torch.no_grad()
def patch_health(patches: Tensor, patches_before_norm: Tensor) -> dict[str, float]:
    """Measures of the patch tokens `[B, h, w, D]` of B images after and before the backbone's final norm.

    `near_similarity`: mean cosine similarity of neighbours in a row or column. `far_similarity`: of patches that lie
    half the grid (rounded up) apart along a row or column. `similarity_decay`: the first less the second.
    `high_norm_share`: share of patches whose norm before the final norm is above three medians (Darcet et al. 2024,
    "Vision transformers need registers", with a threshold that does not depend on the model). Grids of one patch give
    an empty dictionary.
    """
    if patches.ndim != 4 or patches.shape != patches_before_norm.shape:
        raise DataError(
            f"patches must be two tensors [B, h, w, D] of one shape, got {list(patches.shape)} and "
            f"{list(patches_before_norm.shape)}"
        )
    height, width = patches.shape[1:3]
    if height < 2 or width < 2:
        return {}
    unit = normalize(patches.float(), dim=-1)
    near = _similarity_at(unit, 1, 1)
    far = _similarity_at(unit, -(-height // 2), -(-width // 2))
    norms = patch_norms(patches_before_norm)
    return {
        "near_similarity": near,
        "far_similarity": far,
        "similarity_decay": near - far,
        "high_norm_share": high_norm_share(norms, high_norm_threshold(norms)),
    }


def _similarity_at(unit: Tensor, rows: int, columns: int) -> float:
    """Mean cosine similarity of patches `rows` apart in a column and `columns` apart in a row."""
    down = (unit[:, rows:] * unit[:, :-rows]).sum(dim=-1)
    across = (unit[:, :, columns:] * unit[:, :, :-columns]).sum(dim=-1)
    return float(torch.cat([down.flatten(), across.flatten()]).mean())
