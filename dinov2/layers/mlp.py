"""The two-layer feed-forward network of a transformer block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Mlp", "mlp"]


def mlp(
    x: Tensor,  # [..., D]
    fc1_weight: Tensor,  # [hidden, D]
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,  # [D', hidden]
    fc2_bias: Tensor | None,
    activation: Callable[[Tensor], Tensor] = F.gelu,
) -> Tensor:  # [..., D']
    """Linear, activation (exact GELU unless told otherwise), linear."""
    return F.linear(activation(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


class Mlp(nn.Module):
    """Holds the parameters `fc1` and `fc2` of `mlp`; `[..., in_features]` -> `[..., out_features]`."""

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
        if self.training and self.drop.p > 0:
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.act)
