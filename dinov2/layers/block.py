"""The pre-norm transformer block: two residual branches, attention and feed-forward."""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.attention import Attention
from dinov2.layers.drop_path import DropPath, residual_on_subset
from dinov2.layers.layer_scale import LayerScale, add_scaled
from dinov2.layers.mlp import Mlp
from dinov2.layers.packing import Layout, pack, unpack

__all__ = ["Block", "NestedTensorBlock"]

# Above this rate a single batch drops a subset of its samples, up to it each sample by chance, as the release does:
# skipping work pays only when there is enough of it.
_SUBSET_FROM = 0.1


class Block(nn.Module):
    """`x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`, with stochastic depth on both branches in training.

    Takes `[B, T, D]`, or a list of such tensors of different lengths, which is packed: one pass over all tokens.
    `drop_path_per_sample` keeps the classic form at every rate.
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

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """`[B, T, D]` -> `[B, T, D]`, or a list of them -> a list."""
        if isinstance(x, list):
            tokens, layout = pack(x)
            return unpack(self.forward_packed(tokens, layout), layout)
        rate = self.sample_drop_ratio
        if self.training and rate > _SUBSET_FROM and not self.drop_path_per_sample:
            batch, length, _ = x.shape
            return self.forward_packed(x.flatten(0, 1), ((batch, length),)).unflatten(0, (batch, length))
        if not self.training:
            x = add_scaled(x, self.attn(self.norm1(x)), self.ls1)
            return add_scaled(x, self.mlp(self.norm2(x)), self.ls2)
        attended: Tensor = x + self.drop_path1(self._attention(x))
        output: Tensor = attended + self.drop_path2(self._feed_forward(attended))
        return output

    def forward_packed(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Packed rows `[S, D]` -> `[S, D]`; in training every rate above 0 drops a subset of each group."""
        rate = self.sample_drop_ratio if self.training else 0.0
        if rate == 0.0:
            tokens = add_scaled(tokens, self.attn(self.norm1(tokens), layout), self.ls1)
            return add_scaled(tokens, self.mlp(self.norm2(tokens)), self.ls2)
        if self.drop_path_per_sample:
            tokens = tokens + _drop_packed(self._attention(tokens, layout), layout, self.drop_path1)
            return tokens + _drop_packed(self._feed_forward(tokens), layout, self.drop_path2)
        tokens = residual_on_subset(tokens, self._attention, layout, rate)
        return residual_on_subset(tokens, self._feed_forward, layout, rate)

    def _attention(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), layout))

    def _feed_forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


class NestedTensorBlock(Block):
    """The release's name for the block that takes lists of crops; here every block does."""


def _drop_packed(residual: Tensor, layout: Layout, drop: nn.Module) -> Tensor:
    return pack([drop(group) for group in unpack(residual, layout)])[0]
