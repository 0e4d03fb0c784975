"""Building blocks of the models: functions of tensors, and thin modules that hold their parameters. Torch alone."""

from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.block import Block, NestedTensorBlock
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.drop_path import DropPath
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused

__all__ = [
    "Attention",
    "Block",
    "DINOHead",
    "DropPath",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "PatchEmbed",
    "SwiGLUFFN",
    "SwiGLUFFNFused",
]
