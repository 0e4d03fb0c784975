"""The two-layer feed-forward network of a transformer block."""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.kernels import fused_mlp, fuses_mlp, is_inactive, project

__all__ = ["Mlp"]


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
