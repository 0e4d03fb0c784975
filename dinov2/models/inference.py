"""Copies of a backbone for inference in low precision: the large weights cast once, the rest left in float32.

Autocast converts every weight at every call. A copy that keeps them in bfloat16 does not, and it can be more exact at
the same speed: the residual stream, the norms, the layer scales, the patch projection and the position embeddings stay
in float32, and only what the blocks' matrix products read is rounded.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dinov2.layers.kernels import is_untouched, onednn_is_faster, packed_weight
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["cast_blocks", "optimize_for_inference"]


def optimize_for_inference(
    backbone: DinoVisionTransformer, dtype: torch.dtype | None = torch.bfloat16
) -> DinoVisionTransformer:
    """The fastest form for computing without gradients: `cast_blocks`, with weights in the order the processor reads.

    The copy is for calls on this machine, in inference mode or under `torch.no_grad()`, and for nothing else: to
    compile, trace, move or save, use `cast_blocks`. With `dtype` None or `torch.float32`, `backbone` itself comes back.
    """
    if dtype is None or dtype == torch.float32:
        return backbone
    frozen = cast_blocks(backbone, dtype)
    if dtype == torch.bfloat16 and frozen.cls_token.device.type == "cpu" and onednn_is_faster():
        for block in frozen.block_list:
            for layer in (*block.attn.modules(), *block.mlp.modules()):
                if is_untouched(layer, nn.Linear):
                    layer.weight = nn.Parameter(packed_weight(cast(Tensor, layer.weight)), requires_grad=False)
    return frozen


def cast_blocks(backbone: DinoVisionTransformer, dtype: torch.dtype) -> DinoVisionTransformer:
    """A frozen copy of `backbone`, in evaluation mode, whose blocks multiply in `dtype`; float32 in and out.

    Later changes of `backbone` do not reach the copy.
    """
    stand_ins = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for block in backbone.block_list
        for branch in (block.attn, block.mlp)
        for parameter in branch.parameters()
    }
    frozen = copy.deepcopy(backbone, stand_ins).eval().requires_grad_(False)
    for block in frozen.block_list:
        block.norm1, block.norm2 = _RoundedNorm(block.norm1, dtype), _RoundedNorm(block.norm2, dtype)
    return frozen


class _RoundedNorm(nn.Module):
    """A norm in its own precision, its result in another."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(x)
        return output.to(self.dtype)
