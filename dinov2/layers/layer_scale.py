"""LayerScale: one learned factor per channel on every residual branch (arXiv 2103.17239)."""

import torch
from torch import Tensor, nn

from dinov2.layers.recording import is_recording

__all__ = ["LayerScale", "add_scaled", "add_times"]


def add_times(tokens: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
    """`tokens + branch * factors` for `[..., D]`, `[..., D]` and `[D]`, in one pass when no gradients are wanted."""
    if not (torch.is_grad_enabled() or is_recording()) and tokens.dtype == branch.dtype == factors.dtype:
        return torch.addcmul(tokens, branch, factors)
    return tokens + branch * factors


def add_scaled(tokens: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
    """`tokens + scale(branch)` for tensors `[..., D]`, in one pass over them when no gradients are wanted."""
    if type(scale) is LayerScale and not (torch.is_grad_enabled() or is_recording()):
        hooked = scale._forward_hooks or scale._forward_pre_hooks
        if not hooked and tokens.dtype == scale.gamma.dtype:
            return torch.addcmul(tokens, branch, scale.gamma)
    scaled: Tensor = tokens + scale(branch)
    return scaled


class LayerScale(nn.Module):
    """Multiplies the channels of `[..., D]` by `gamma` `[D]`, which starts at `init_values`.

    The parameter is allocated empty and then filled, so that a model can be built on the meta device.
    """

    def __init__(
        self, dim: int, init_values: float = 1e-5, inplace: bool = False, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills `gamma` with the starting value."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
