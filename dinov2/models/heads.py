"""Linear classifiers of the release and the features they read.

A classifier reads the class tokens of the last one or four blocks, then the mean of the patches of the last: `2 D` or
`5 D` features. All tokens are those after the backbone's final norm; registers are never read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError

__all__ = ["LinearHead", "classifier_input", "linear_logits"]


class LinearHead(nn.Linear):
    """Features of `classifier_input` `[B, (1+layers)*D]` -> logits `[B, C]`; its keys are those of the head files.

    Raises `ConfigError` for a number of layers that no classifier was released for.
    """

    def __init__(self, embed_dim: int, *, layers: int = 1, num_classes: int = 1000) -> None:
        if layers not in (1, 4):
            raise ConfigError(f"a linear classifier reads 1 or 4 layers, not {layers}; write layers=1 or layers=4")
        super().__init__((1 + layers) * embed_dim, num_classes)
        self.layers = layers


def classifier_input(
    cls_tokens: Sequence[Tensor],  # [B, D] each: of the last block, or of the last four in ascending order
    patch_tokens: Tensor,  # [B, N, D] or [B, h, w, D] of the last block
) -> Tensor:  # [B, (1+layers)*D]
    """The vector that the released classifiers read: the class tokens, then the mean of the patch tokens."""
    return torch.cat([*cls_tokens, patch_tokens.flatten(1, -2).mean(dim=1)], dim=-1)


def linear_logits(backbone: Any, head: Any, x: Tensor, *, layers: int | None = None) -> Tensor:
    """Logits `[B, C]` of normalised images `[B, 3, H, W]`, from any backbone with `get_intermediate_layers`.

    `head` is any module on features of `classifier_input`; `layers` is the number of blocks it reads, which a
    `LinearHead` has itself.
    """
    blocks = backbone.get_intermediate_layers(x, n=head.layers if layers is None else layers, return_class_token=True)
    return head(classifier_input([cls_token for _, cls_token in blocks], blocks[-1][0]))
