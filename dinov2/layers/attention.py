"""Multi-head self-attention over one group of equally long sequences, or over packed groups of several lengths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.linear import onednn_is_faster, project
from dinov2.layers.packing import Layout, unpack
from dinov2.layers.recording import is_recording

__all__ = ["Attention", "MemEffAttention", "attend", "attend_heads", "attend_packed", "attention_weights"]

# On a CPU, up to this many tokens two batched products and a softmax beat the fused kernel, whose backward is slow on
# short sequences (benchmarks/train_step.py shows both).
_SHORT = 64

# Most scores that are held at once in inference, over the heads of as many images as fit: 128 MiB in bfloat16.
_SCORES = 2**26


def attend(qkv: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """Joint projections `[B, T, 3*D]` (queries, keys, values; heads inside each) -> attended values `[B, T, D]`."""
    batch, length, width = qkv.shape
    heads = qkv.reshape(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    attended = attend_heads(*heads.unbind(0), dropout=dropout)
    return attended.transpose(1, 2).reshape(batch, length, width // 3)


def attend_heads(
    query: Tensor,  # [B, heads, T, d]
    key: Tensor,  # [B, heads, T, d]
    value: Tensor,  # [B, heads, T, d]
    *,
    mask: Tensor | None = None,  # broadcasts to [B, heads, T, T]: False is left out, or numbers added to the scores
    dropout: float = 0.0,
) -> Tensor:  # [B, heads, T, d]
    """Scaled dot-product attention by the kernel that is fastest where it runs; scores are scaled by `d ** -0.5`."""
    if mask is None and _multiplies_explicitly(query, dropout):
        return _explicit_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def attention_weights(
    query: Tensor,  # [B, heads, T, d]
    key: Tensor,  # [B, heads, T, d]
    *,
    mask: Tensor | None = None,  # as for `attend_heads`
) -> Tensor:  # [B, heads, T, T]
    """What `attend_heads` weighs the values with, for whoever wants to see or change it; rows sum to 1."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        # The least number and not -inf: a row that attends to nothing stays finite.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def _multiplies_explicitly(query: Tensor, dropout: float) -> bool:
    _, num_heads, length, _ = query.shape
    if query.device.type != "cpu" or dropout > 0.0 or is_recording():
        return False
    if query.requires_grad:
        return length <= _SHORT
    # The fused kernel multiplies bfloat16 at a fraction of the processor's speed where there is no AMX.
    return query.dtype == torch.bfloat16 and num_heads * length**2 <= _SCORES and onednn_is_faster()


def _explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # all [B, heads, T, d]
    if query.requires_grad:
        return attention_weights(query, key).to(value.dtype) @ value
    batch, num_heads, length, _ = query.shape
    at_once = max(_SCORES // max(num_heads * length**2, 1), 1)
    if batch > at_once:
        parts = zip(query.split(at_once), key.split(at_once), value.split(at_once), strict=True)
        return torch.cat([_explicit_attention(*part) for part in parts])
    query, key, value = (heads.contiguous().flatten(0, 1) for heads in (query, key, value))  # [B*heads, T, d] each
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), value).unflatten(0, (batch, num_heads))


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
        qkv = project(self.qkv, x)
        if layout is None:
            attended = attend(qkv, self.num_heads, dropout)
        else:
            attended = attend_packed(qkv, layout, self.num_heads, dropout)
        return self.proj_drop(project(self.proj, attended))


class MemEffAttention(Attention):
    """The release's name for the attention that takes packed crops; here every attention does."""
