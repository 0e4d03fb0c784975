"""The gated feed-forward network SwiGLU (arXiv 2002.05202), in the two forms that the public release names.

`SwiGLUFFN` takes its hidden width as given. `SwiGLUFFNFused` is what the models use: it keeps two thirds of the width
asked for, rounded up to a multiple of 8, so that it has about as many parameters as the plain MLP.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.linear import is_plain, linear
from dinov2.layers.scratch import feed_forward_in_scratch, reuses_memory

__all__ = ["SwiGLUFFN", "SwiGLUFFNFused", "swiglu", "swiglu_hidden_features"]


def swiglu_hidden_features(hidden_features: int) -> int:
    """Two thirds of `hidden_features`, rounded up to a multiple of 8: 4096 -> 2736, 6144 -> 4096."""
    return (int(hidden_features * 2 / 3) + 7) // 8 * 8


def swiglu(
    x: Tensor,  # [..., D]
    w12_weight: Tensor,  # [2 * hidden, D]: gate first, then value
    w12_bias: Tensor | None,
    w3_weight: Tensor,  # [D', hidden]
    w3_bias: Tensor | None,
) -> Tensor:  # [..., D']
    """`w3(silu(gate) * value)`."""
    if reuses_memory(x, w12_weight, w3_weight):
        return feed_forward_in_scratch(x, (w12_weight, w12_bias), _gate_in_place, (w3_weight, w3_bias))
    gate, value = linear(x, w12_weight, w12_bias).chunk(2, dim=-1)
    return linear(F.silu(gate) * value, w3_weight, w3_bias)


def _gate_in_place(wide: Tensor) -> Tensor:  # [N, 2 * hidden] -> [N, hidden], a view
    gate, value = wide.chunk(2, dim=-1)
    return value.mul_(F.silu(gate, inplace=True))


class SwiGLUFFN(nn.Module):
    """Holds the parameters `w12` and `w3` of `swiglu`; `act_layer` and `drop` are accepted for the MLP's sake."""

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
        if is_plain(self.w12) and is_plain(self.w3):
            return swiglu(x, self.w12.weight, self.w12.bias, self.w3.weight, self.w3.bias)
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


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
