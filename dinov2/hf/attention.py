"""Which attention a call gets: the project's kernels, explicit weights, or a kernel registered with transformers.

- `sdpa` (the default): `dinov2.layers.attention.attend_heads`, which takes PyTorch's fused attention or, where it
  measured faster, explicit products.
- `eager`, and every implementation as soon as weights are asked for or heads are masked: explicit weights.
- any other name (`flex_attention`, `flash_attention_2`, ...): what transformers has registered under it. What such a
  kernel cannot do falls to `sdpa`: masks, dropout and gradients on a CPU with flex attention, masks of single scores
  with flash attention.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.hf.quiet import quiet_import
from dinov2.layers.attention import attend_heads, attention_weights
from dinov2.layers.packing import Layout, unpack
from dinov2.layers.recording import is_recording

with quiet_import():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["AttentionCall", "attend_as_told", "prepared_mask"]


class AttentionCall(NamedTuple):
    """What one forward pass asks of the attention in every layer."""

    mask: Tensor | None = None
    """Broadcasts to [B, heads, T, T]: False is left out, or numbers that are added to the scores."""
    want_weights: bool = False
    layout: Layout | None = None
    """Of packed rows; None for ordinary batches."""


def attend_as_told(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, head_mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Projections `[B, T, heads * d]` (or packed rows `[S, heads * d]`) -> attended values alike, weights or None.

    `head_mask` is `[heads]` or broadcasts to `[B, heads, T, T]`; weights come as they were used, after dropout.
    """
    if call.layout is None:
        return _attend(module, queries, keys, values, head_mask, call)
    groups = zip(*(unpack(rows, call.layout) for rows in (queries, keys, values)), strict=True)
    parts = [_attend(module, q, k, v, head_mask, call)[0].flatten(0, 1) for q, k, v in groups]
    return torch.cat(parts), None


def prepared_mask(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """A mask of tokens `[B, T]` (1 attends) as `[B, 1, 1, T]` of bool, None if it masks nothing; 4-D ones as they are.

    Raises `ValueError` for another shape.
    """
    if mask is None or mask.ndim == 4:
        return mask
    batch, length = tokens.shape[:2]
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, but there are {batch} images of {length} tokens (class "
            f"token, registers and patches); give [{batch}, {length}], or a prepared 4-D mask"
        )
    attends = mask.to(tokens.device) != 0
    # A compiled or recorded graph cannot branch on what is in a tensor.
    whole = not (torch.compiler.is_compiling() or is_recording()) and bool(attends.all())
    return None if whole else attends[:, None, None, :]


def _attend(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, head_mask: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    size = module.attention_head_size
    query, key, value = (_heads(rows, size) for rows in (queries, keys, values))  # [B, heads, T, d] each
    dropout = module.dropout_prob if module.training else 0.0
    mask = call.mask
    chosen = module.config._attn_implementation
    if chosen not in (None, "eager", "sdpa"):
        chosen, mask = _possible(chosen, mask, dropout=dropout, backward_on_cpu=query.requires_grad and query.is_cpu)
    weights = None
    if chosen == "eager" or call.want_weights or head_mask is not None:
        weights = attention_weights(query, key, mask=mask)
        weights = F.dropout(weights, dropout, training=module.training)
        if head_mask is not None:
            weights = weights * (head_mask[:, None, None] if head_mask.ndim == 1 else head_mask)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2)
    elif chosen in (None, "sdpa"):
        attended = attend_heads(query, key, value, mask=mask, dropout=dropout).transpose(1, 2)
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[chosen]
        attended, _ = kernel(
            module, query, key, value, mask, dropout=dropout, scaling=size**-0.5, is_causal=False
        )  # [B, T, heads, d]
    return attended.flatten(2), weights if call.want_weights else None


def _possible(chosen: str, mask: Tensor | None, *, dropout: float, backward_on_cpu: bool) -> tuple[str, Tensor | None]:
    """The kernel that can do what is asked, and the mask in its form; `sdpa` where the chosen one cannot."""
    if chosen == "flex_attention" and (mask is not None or dropout or backward_on_cpu):
        return "sdpa", mask
    if "flash" in chosen and mask is not None:
        of_tokens = mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
        return (chosen, mask[:, 0, 0]) if of_tokens else ("sdpa", mask)  # flash attention takes [B, T]
    return chosen, mask


def _heads(rows: Tensor, size: int) -> Tensor:  # [B, T, heads * d] -> [B, heads, T, d]
    batch, length, width = rows.shape
    return rows.reshape(batch, length, width // size, size).transpose(1, 2)
