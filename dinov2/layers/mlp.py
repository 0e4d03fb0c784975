"""The two-layer feed-forward network of a transformer block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.kernels import fused_mlp, fuses_mlp, is_inactive, linear, project

__all__ = ["Mlp", "mlp"]


class Mlp(nn.Module):
    """Linear, activation, linear: `[..., in_features]` -> `[..., out_features]`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features or in_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features or in_features, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        if is_inactive(self.drop) and fuses_mlp(x, self.fc1, self.act, self.fc2):
            return fused_mlp(x, self.fc1, self.fc2)
        x = self.drop(self.act(project(self.fc1, x)))
        return self.drop(project(self.fc2, x))


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: Callable[[Tensor], Tensor] = F.gelu,
) -> Tensor:
    """The same of single tensors, for dinov2.hf until it calls its modules."""
    return linear(activation(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
