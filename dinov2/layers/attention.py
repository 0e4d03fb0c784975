"""Multi-head self-attention over one group of equally long sequences, or over packed groups of several lengths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.kernels import explicit_attention, is_untouched, prefers_explicit_attention, project
from dinov2.layers.packing import PackedLayout, unpack

__all__ = ["Attention", "MemEffAttention", "attend_heads", "attention_weights"]


def attend_heads(
    query: Tensor,  # [B, heads, T, d]
    key: Tensor,  # [B, heads, T, d]
    value: Tensor,  # [B, heads, T, d]
    *,
    mask: Tensor | None = None,  # broadcasts to [B, heads, T, T]: False is left out, or numbers added to the scores
    dropout: float = 0.0,
) -> Tensor:  # [B, heads, T, d]
    """Scaled dot-product attention by the kernel that is fastest where it runs; scores are scaled by `d ** -0.5`."""
    if mask is None and prefers_explicit_attention(query, dropout):
        return explicit_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def attention_weights(
    query: Tensor,  # [B, heads, T, d]
    key: Tensor,  # [B, heads, T, d]
    *,
    mask: Tensor | None = None,  # as for `attend_heads`
) -> Tensor:  # [B, heads, T, T]
    """Softmax weights of `attend_heads`, whose fused kernel does not keep them; rows sum to 1."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        # The least number and not -inf: a row that attends to nothing stays finite.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


class Attention(nn.Module):
    """Self-attention, `[B, T, D]` -> `[B, T, D]`; with a layout, over packed rows `[S, D]`.

    A module in the place of `attn_drop`, or a hook on it, sees the attention weights `[B, heads, T, T]`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is no multiple of num_heads {num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_weights(
        self, init_attn_std: float | None = None, init_proj_std: float | None = None, factor: float = 1.0
    ) -> None:
        """Draw both matrices from normal distributions, by default with the deviation `D ** -0.5`; biases are zero."""
        attention_std = init_attn_std or self.dim**-0.5
        deviations = ((self.qkv, attention_std), (self.proj, init_proj_std or attention_std * factor))
        for layer, deviation in deviations:
            nn.init.normal_(layer.weight, std=deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, layout: PackedLayout | None = None, *, attn_bias: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`; with a layout, packed rows `[S, D]` -> `[S, D]`.

        `attn_bias` broadcasts to `[B, heads, T, T]`: numbers are added to the scores, False leaves a pair out;
        `is_causal` leaves out what lies behind each token.
        """
        qkv = project(self.qkv, x)
        if layout is None:
            return self._project_out(self._attend(qkv, _mask(attn_bias, is_causal, qkv)))
        if attn_bias is not None or is_causal:
            raise ValueError("packed rows attend within their sequences alone; give no attn_bias with a layout")
        groups = [self._attend(group).flatten(0, 1) for group in unpack(qkv, layout)]
        return self._project_out(groups[0] if len(groups) == 1 else torch.cat(groups))

    def _attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, T, 3*D] -> [B, T, D]
        batch, length, width = qkv.shape
        heads = qkv.reshape(batch, length, 3, self.num_heads, width // (3 * self.num_heads)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)  # [B, heads, T, d]
        if is_untouched(self.attn_drop, nn.Dropout):
            dropout = self.attn_drop.p if self.attn_drop.training else 0.0
            attended = attend_heads(query, key, value, mask=mask, dropout=dropout)
        else:
            attended = self.attn_drop(attention_weights(query, key, mask=mask)).to(value.dtype) @ value
        return attended.transpose(1, 2).reshape(batch, length, width // 3)

    def _project_out(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.proj_drop(project(self.proj, attended))
        return projected


MemEffAttention = Attention
"""The release's name for attention by a fused kernel; here every attention is."""


def _mask(attn_bias: object, is_causal: bool, qkv: Tensor) -> Tensor | None:
    if is_causal:
        if attn_bias is not None:
            raise ValueError("is_causal and attn_bias are both given; put the causal mask into attn_bias")
        return torch.ones(qkv.shape[1], qkv.shape[1], dtype=torch.bool, device=qkv.device).tril()
    if attn_bias is not None and not isinstance(attn_bias, Tensor):
        raise TypeError(
            f"attn_bias is a {type(attn_bias).__name__}; give a tensor, or for crops of different sizes a list of "
            "token tensors to the block, which packs them (dinov2.layers.packing)"
        )
    return attn_bias
