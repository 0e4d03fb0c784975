"""The projection head: tokens to prototype scores (arXiv 2104.14294; shared or separate for patches: 2304.07193)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DINOHead", "WeightNormLinear"]


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are `weight_g * weight_v / |weight_v|`; both factors are trained.

    The two parameters carry the names of the released training files; files that use the names of PyTorch's
    parametrisation (`parametrizations.weight.original0/1`) load as well.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Magnitudes of one, directions as PyTorch starts a linear layer."""
        nn.init.ones_(self.weight_g)
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The effective weight `[out, in]`, computed in float32."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return F.linear(x, self.weight)

    def _load_from_state_dict(self, state_dict: Mapping[str, object], prefix: str, *rest: object) -> None:
        assert isinstance(state_dict, dict)
        for ours, theirs in (("weight_g", "original0"), ("weight_v", "original1")):
            renamed = f"{prefix}parametrizations.weight.{theirs}"
            if renamed in state_dict:
                state_dict[prefix + ours] = state_dict.pop(renamed)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DINOHead(nn.Module):
    """Tokens `[..., in_dim]` -> scores `[..., out_dim]` of the prototypes; at the start these are cosines.

    `nlayers` linear layers with GELU between them (and batch norm on request), L2 normalisation of the bottleneck,
    then a weight-normalised linear map.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = _build_mlp(max(nlayers, 1), in_dim, bottleneck_dim, hidden_dim, use_bn, mlp_bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_dim]` -> `[..., out_dim]`."""
        return self.last_layer(self.bottleneck(x))

    def bottleneck(self, x: Tensor) -> Tensor:
        """The normalised features in front of the prototypes, `[..., bottleneck_dim]`."""
        hidden = self.mlp(x)
        eps = 1e-6 if hidden.dtype == torch.float16 else 1e-12
        return F.normalize(hidden, dim=-1, p=2, eps=eps)


def _build_mlp(nlayers: int, in_dim: int, out_dim: int, hidden_dim: int, use_bn: bool, bias: bool) -> nn.Module:
    if nlayers == 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    layers: list[nn.Module] = []
    for layer in range(nlayers - 1):
        layers.append(nn.Linear(in_dim if layer == 0 else hidden_dim, hidden_dim, bias=bias))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    layers.append(nn.Linear(hidden_dim, out_dim, bias=bias))
    return nn.Sequential(*layers)
