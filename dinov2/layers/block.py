"""The pre-norm transformer block: two residual branches, attention and feed-forward."""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.attention import Attention
from dinov2.layers.drop_path import DropPath, residual_on_subset
from dinov2.layers.kernels import add_scaled, is_inactive, is_untouched
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.packing import PackedLayout, pack, unpack

__all__ = ["Block", "NestedTensorBlock"]

# Above this rate a single batch drops a subset of its samples, up to it each sample by chance, as the release does:
# skipping work pays only when there is enough of it.
_SUBSET_FROM = 0.1

_Branch = Callable[[Tensor, PackedLayout | None], Tensor]


class Block(nn.Module):
    """`x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`, with stochastic depth on both branches in training.

    `drop_path_per_sample` keeps the classic form of stochastic depth at every rate.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        drop_path_per_sample: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=drop
        )
        self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.sample_drop_ratio = drop_path
        self.drop_path_per_sample = drop_path_per_sample
        # An attention of somebody else's knows no layouts; wrappers that are put around ours later pass them on.
        self._packs_attention = isinstance(self.attn, Attention)

    def forward(self, x: Tensor | list[Tensor], layout: PackedLayout | None = None) -> Tensor | list[Tensor]:
        """`[B, T, D]` -> `[B, T, D]`; a list of them, packed for one pass -> a list; packed rows `[S, D]` -> rows."""
        if isinstance(x, list):
            tokens, layout = pack(x)
            return unpack(self._add_branches(tokens, layout), layout)
        return self._add_branches(x, layout)

    def _add_branches(self, x: Tensor, layout: PackedLayout | None) -> Tensor:
        x = self._add(x, self._attention, self.ls1, self.drop_path1, layout)
        return self._add(x, self._feed_forward, self.ls2, self.drop_path2, layout)

    def _attention(self, x: Tensor, layout: PackedLayout | None) -> Tensor:
        x = self.norm1(x)
        if layout is None:
            return self.attn(x)
        if self._packs_attention:
            return self.attn(x, layout)
        return pack([self.attn(group) for group in unpack(x, layout)])[0]

    def _feed_forward(self, x: Tensor, layout: PackedLayout | None) -> Tensor:
        return self.mlp(self.norm2(x))

    def _add(
        self, x: Tensor, branch: _Branch, scale: nn.Module, drop: nn.Module, layout: PackedLayout | None
    ) -> Tensor:
        """`x` plus a branch, its layer scale and its stochastic depth."""
        if self._drops_subset(drop, packed=layout is not None):
            rows, groups = (x.flatten(0, 1), ((x.shape[0], x.shape[1]),)) if layout is None else (x, layout)
            scaled_branch = lambda kept, kept_layout: scale(branch(kept, kept_layout))  # noqa: E731
            return residual_on_subset(rows, scaled_branch, groups, self.sample_drop_ratio).view_as(x)
        residual = branch(x, layout)
        if is_inactive(drop) or (is_untouched(drop, DropPath) and not drop.training):
            one_pass = is_untouched(scale, LayerScale)
            return add_scaled(x, residual, scale.gamma) if one_pass else x + scale(residual)  # type: ignore[arg-type]
        residual = scale(residual)
        if layout is None:
            return x + drop(residual)
        return x + pack([drop(group) for group in unpack(residual, layout)])[0]

    def _drops_subset(self, drop: nn.Module, *, packed: bool) -> bool:
        if not self.training or self.drop_path_per_sample or type(drop) is not DropPath:
            return False
        return self.sample_drop_ratio > (0.0 if packed else _SUBSET_FROM)


NestedTensorBlock = Block
"""The release's name for the block that takes lists of crops; here every block does."""
