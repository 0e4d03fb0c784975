"""Which attention a call gets: the project's kernels, explicit weights, or a kernel registered with transformers.

- `sdpa` (the default): `dinov2.layers.attention.attend_heads`, which takes PyTorch's fused attention or, where it
  measured faster, explicit products.
- `eager`, and `sdpa`, flex and flash attention as soon as weights are returned or heads are masked: explicit weights.
- any other name: the function that is registered with transformers under it, also where a user registered one as
  `sdpa` or `eager`. What flex and flash attention cannot do falls to `sdpa`: masks, dropout and gradients on a CPU with
  flex attention, masks of single scores with flash attention.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.hf.quiet import quiet_import
from dinov2.layers.attention import attend_heads, attention_weights
from dinov2.layers.packing import Layout, unpack
from dinov2.layers.recording import is_recording

with quiet_import():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["attention_forward", "prepared_mask"]

_STOCK_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


def attention_forward(
    module: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Projections `[B, T, heads * d]` (or packed rows `[S, heads * d]`) -> attended values alike, weights or None.

    `attention_mask` broadcasts to `[B, heads, T, T]`: False is left out, or numbers are added to the scores;
    `head_mask` is `[heads]` or broadcasts to `[B, heads, T, T]`; weights are those in use, after dropout.
    """
    if layout is None:
        return _attend(module, queries, keys, values, attention_mask, head_mask, output_attentions)
    groups = zip(*(unpack(rows, layout) for rows in (queries, keys, values)), strict=True)
    attended = [_attend(module, q, k, v, attention_mask, head_mask, False)[0].flatten(0, 1) for q, k, v in groups]
    return torch.cat(attended), None


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
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    head_mask: Tensor | None,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    size = module.attention_head_size
    query, key, value = (_heads(rows, size) for rows in (queries, keys, values))  # [B, heads, T, d] each
    dropout = module.dropout_prob if module.training else 0.0
    implementation = module.config._attn_implementation
    kernel = _registered_kernel(implementation)
    is_standard = kernel is None or implementation == "flex_attention" or "flash" in implementation
    if kernel is None or head_mask is not None or (output_attentions and is_standard):
        query = query * (module.scaling * size**0.5) if module.scaling != size**-0.5 else query
        if implementation != "eager" and head_mask is None and not output_attentions:
            attended = attend_heads(query, key, value, mask=mask, dropout=dropout)
            return attended.transpose(1, 2).flatten(2), None
        weights = F.dropout(attention_weights(query, key, mask=mask), dropout, training=module.training)
        if head_mask is not None:
            weights = weights * (head_mask[:, None, None] if head_mask.ndim == 1 else head_mask)
        attended = (weights.to(value.dtype) @ value).transpose(1, 2)
        return attended.flatten(2), weights if output_attentions else None
    if is_standard:
        on_cpu_with_gradient = query.requires_grad and query.is_cpu
        kernel, mask = _possible(implementation, kernel, mask, dropout=dropout, backward_on_cpu=on_cpu_with_gradient)
    attended, weights = kernel(
        module, query, key, value, mask, dropout=dropout, scaling=module.scaling, is_causal=module.is_causal
    )  # [B, T, heads, d]
    if output_attentions and weights is None:
        weights = attention_weights(query * (module.scaling * size**0.5), key, mask=mask)
    return attended.flatten(2), weights if output_attentions else None


def _registered_kernel(implementation: str | None) -> Callable[..., Any] | None:
    """The function registered under the name; None for `sdpa` and `eager`, unless a user registered another there."""
    if implementation is None or (implementation == "eager" and "eager" not in ALL_ATTENTION_FUNCTIONS):
        return None
    kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
    return None if kernel is _STOCK_SDPA else kernel


def _possible(
    implementation: str, kernel: Callable[..., Any], mask: Tensor | None, *, dropout: float, backward_on_cpu: bool
) -> tuple[Callable[..., Any], Tensor | None]:
    """The kernel that can do the call, and the mask in its form; `sdpa` where the chosen one cannot."""
    if implementation == "flex_attention" and (mask is not None or dropout or backward_on_cpu):
        return _STOCK_SDPA, mask
    if "flash" in implementation and mask is not None:
        is_per_token = mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
        return (kernel, mask[:, 0, 0]) if is_per_token else (_STOCK_SDPA, mask)  # flash attention takes [B, T]
    return kernel, mask


def _heads(rows: Tensor, size: int) -> Tensor:  # [B, T, heads * d] -> [B, heads, T, d]
    batch, length, width = rows.shape
    return rows.reshape(batch, length, width // size, size).transpose(1, 2)
