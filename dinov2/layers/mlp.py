"""The two-layer feed-forward network of a transformer block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.linear import is_plain, linear, linear_gelu
from dinov2.layers.scratch import feed_forward_in_scratch, reuses_memory

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
    if activation is F.gelu:
        if reuses_memory(x, fc1_weight, fc2_weight):
            return feed_forward_in_scratch(x, (fc1_weight, fc1_bias), torch.ops.aten.gelu_, (fc2_weight, fc2_bias))
        return linear(linear_gelu(x, fc1_weight, fc1_bias), fc2_weight, fc2_bias)
    return linear(activation(linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


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
        if not (is_plain(self.fc1) and is_plain(self.fc2)):
            return self.fc2(self.act(self.fc1(x)))
        exact_gelu = type(self.act) is nn.GELU and self.act.approximate == "none" and not self.act._forward_hooks
        activation = F.gelu if exact_gelu else self.act
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation)
