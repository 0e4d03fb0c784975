"""LayerScale: one learned factor per channel on every residual branch (arXiv 2103.17239)."""

import torch
from torch import Tensor, nn

__all__ = ["LayerScale"]


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
