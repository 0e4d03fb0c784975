"""Attention of one block, computed again from its queries and keys: the fused kernel of the forward pass keeps none.

Only rows of the given queries are computed (`[B, heads, Q, T]`, not `[B, heads, T, T]`), so that large images fit.
Tokens are ordered class token, registers, patches row by row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["AttentionRows", "BlockView", "attention_rows", "block_number", "look_into_block", "patch_token"]


class AttentionRows(NamedTuple):
    """Softmax weights from Q queries to all tokens, taken apart by kind; the three sum to 1."""

    to_cls: Tensor
    """float32 [B, heads, Q]."""
    to_registers: Tensor
    """float32 [B, heads, Q, R]."""
    to_patches: Tensor
    """float32 [B, heads, Q, h, w]."""


class BlockView(NamedTuple):
    """Residual stream and attention of one block."""

    tokens: Tensor
    """[B, 1+R+N, D]: the residual stream behind the block, before the final norm."""
    attention: AttentionRows


def patch_token(row: int, column: int, *, grid: tuple[int, int], num_register_tokens: int = 0) -> int:
    """Position of a patch in the sequence of tokens."""
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ConfigError(f"there is no patch ({row}, {column}) on a grid of {grid[0]} rows and {grid[1]} columns")
    return 1 + num_register_tokens + row * grid[1] + column


def block_number(block: int, n_blocks: int) -> int:
    """The index from 0 of a block that may be counted from the end. Raises `ConfigError` when there is none."""
    if not -n_blocks <= block < n_blocks:
        raise ConfigError(
            f"there is no block {block} in a model of {n_blocks} blocks; choose 0 to {n_blocks - 1}, or -1 for the last"
        )
    return block % n_blocks


def attention_rows(qkv: Tensor, num_heads: int, queries: Sequence[int]) -> Tensor:
    """Joint projections `[B, T, 3*D]` -> float32 `[B, heads, Q, T]`: softmax over all tokens, for some queries.

    In float32 whatever the type of `qkv`, even under autocast, because small weights are what a map shows.
    """
    batch, length, width = qkv.shape
    heads = qkv.reshape(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    query, key = heads[0].float(), heads[1].float()  # [B, heads, T, D/heads]
    with torch.autocast(qkv.device.type, enabled=False):
        chosen = query[:, :, list(queries)] * query.shape[-1] ** -0.5
        return (chosen @ key.transpose(-2, -1)).softmax(dim=-1)


@torch.no_grad()
def look_into_block(
    model: nn.Module,
    images: Tensor,  # [B, C, H, W], normalised, sides multiples of the patch
    *,
    block: int = -1,
    queries: Sequence[int] = (0,),
) -> BlockView:
    """Run `model` up to a block (counted from 0, or from the end) and look at the attention inside it.

    `queries` are positions of tokens: 0 is the class token, then the registers, then `patch_token`. The model should be
    in evaluation mode. Raises `ConfigError` for a model whose queries and keys are not those of this package's
    transformer, and for a block that does not exist.
    """
    if not isinstance(model, DinoVisionTransformer):
        raise ConfigError(
            f"attention maps need the queries and keys of each block, which a {type(model).__name__} does not show; "
            "leave attention out, or load the same weights as a model of this package"
        )
    grid = model.patch_grid(*images.shape[-2:])
    last = block_number(block, model.n_blocks)
    tokens = model.prepare_tokens_with_masks(images)
    for earlier in model.block_list[:last]:
        tokens = earlier(tokens)
    chosen: Any = model.block_list[last]
    rows = attention_rows(chosen.attn.qkv(chosen.norm1(tokens)), chosen.attn.num_heads, queries)
    patches_from = 1 + model.num_register_tokens
    attention = AttentionRows(
        to_cls=rows[..., 0],
        to_registers=rows[..., 1:patches_from],
        to_patches=rows[..., patches_from:].unflatten(-1, grid),
    )
    return BlockView(tokens=chosen(tokens), attention=attention)
