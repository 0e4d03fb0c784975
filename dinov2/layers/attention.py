"""Multi-head self-attention over one group of equally long sequences, or over packed groups of several lengths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.packing import Layout, unpack

__all__ = ["Attention", "MemEffAttention", "attend", "attend_packed"]

# On a CPU, up to this many tokens two batched products and a softmax beat the fused kernel, whose backward is slow on
# short sequences (benchmarks/train_step.py shows both).
_SHORT = 64


def attend(qkv: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """Joint projections `[B, T, 3*D]` (queries, keys, values; heads inside each) -> attended values `[B, T, D]`."""
    batch, length, width = qkv.shape
    heads = qkv.reshape(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    query, key, value = heads.unbind(0)  # [B, heads, T, D/heads] each
    if qkv.device.type == "cpu" and qkv.requires_grad and length <= _SHORT and dropout == 0.0:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        attended = scores.softmax(dim=-1).to(value.dtype) @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attended.transpose(1, 2).reshape(batch, length, -1)


def attend_packed(qkv: Tensor, layout: Layout, num_heads: int, dropout: float = 0.0) -> Tensor:
    """Packed rows `[S, 3*D]` -> `[S, D]`; every sequence of the layout attends to itself alone."""
    groups = [attend(group, num_heads, dropout).flatten(0, 1) for group in unpack(qkv, layout)]
    return groups[0] if len(groups) == 1 else torch.cat(groups)


class Attention(nn.Module):
    """Holds `qkv` and `proj`; `[B, T, D]` -> `[B, T, D]`, or packed rows with a layout."""

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
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`; with a layout, packed rows `[S, D]` -> `[S, D]`."""
        dropout = self.attn_drop.p if self.training else 0.0
        qkv = self.qkv(x)
        if layout is None:
            attended = attend(qkv, self.num_heads, dropout)
        else:
            attended = attend_packed(qkv, layout, self.num_heads, dropout)
        return self.proj_drop(self.proj(attended))


class MemEffAttention(Attention):
    """The release's name for the attention that takes packed crops; here every attention does."""
