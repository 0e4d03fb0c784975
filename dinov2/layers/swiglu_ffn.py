"""The gated feed-forward network SwiGLU (arXiv 2002.05202), in the two forms that the public release names.

`SwiGLUFFN` takes its hidden width as given. `SwiGLUFFNFused` is what the models use: it keeps two thirds of the width
asked for, rounded up to a multiple of 8, so that it has about as many parameters as the plain MLP.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.kernels import fused_swiglu, fuses_swiglu, project

__all__ = ["SwiGLU", "SwiGLUFFN", "SwiGLUFFNFused", "swiglu_hidden_features"]


def swiglu_hidden_features(hidden_features: int) -> int:
    """Two thirds of `hidden_features`, rounded up to a multiple of 8: 4096 -> 2736, 6144 -> 4096."""
    return (int(hidden_features * 2 / 3) + 7) // 8 * 8


class SwiGLUFFN(nn.Module):
    """`w3(silu(gate) * value)`, gate and value from `w12`; `act_layer` and `drop` are accepted for the MLP's sake."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        if fuses_swiglu(x, self.w12, self.w3):
            return fused_swiglu(x, self.w12, self.w3)
        gate, value = project(self.w12, x).chunk(2, dim=-1)
        return project(self.w3, F.silu(gate) * value)


SwiGLU = SwiGLUFFN
"""The release's name for the gated network that takes its hidden width as given."""


class SwiGLUFFNFused(SwiGLUFFN):
    """`SwiGLUFFN` with `swiglu_hidden_features` of the width asked for."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        hidden = swiglu_hidden_features(hidden_features or in_features)
        super().__init__(in_features, hidden, out_features, act_layer, drop, bias)
