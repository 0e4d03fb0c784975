"""The linear classifiers of the release: which features they read, and how a head file is fitted to a backbone.

A head file is a bare `{"weight", "bias"}` and says nothing of itself. The number of blocks it reads follows from its
width: `2 D` for one (class token and mean of the patches of the last block), `5 D` for four (class tokens of the last
four blocks, then the mean of the patches of the last). All tokens are those after the backbone's final norm; registers
are never read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError, WeightsError
from dinov2.models.files import refuse_odd_tensors

__all__ = ["LinearHead", "classifier_input", "head_from_state", "linear_logits"]

_PREFIXES = ("", "linear_head.", "classifier.")
_SIZES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1536: "ViT-g"}


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


def head_from_state(
    state: Mapping[str, Any], *, embed_dim: int, layers: int | None = None, source: str = "the head file"
) -> LinearHead:
    """The head of a file's content, for a backbone that is `embed_dim` wide; in evaluation mode, in float32.

    Keys may also carry the prefix `linear_head.` or `classifier.`. `layers=None` takes the number that the width tells.
    Raises `WeightsError`, with the likely cause, for a head of another backbone or number of layers, and for a file
    that is no linear head.
    """
    weight, bias = _tensors(state, source)
    width = weight.shape[1]
    fitting = {(1 + n) * embed_dim: n for n in (1, 4)}
    if width not in fitting or (layers is not None and fitting[width] != layers):
        raise WeightsError(
            f"{source} reads {width} features, but {_wanted(embed_dim, layers)}; {_likely_cause(width, embed_dim)}"
        )
    with torch.device("meta"):  # its starting values are never read, and the caller's random numbers stay untouched
        head = LinearHead(embed_dim, layers=fitting[width], num_classes=weight.shape[0])
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()}, assign=True)
    return head.eval()


def _tensors(state: Mapping[str, Any], source: str) -> tuple[Tensor, Tensor]:
    for prefix in _PREFIXES:
        weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            continue
        refuse_odd_tensors({"weight": weight, "bias": bias}, source)
        if weight.ndim == 2 and bias.shape == weight.shape[:1]:
            return weight, bias
        raise WeightsError(
            f"the weight {list(weight.shape)} and bias {list(bias.shape)} of {source} are no linear head; "
            "give a weight [classes, features] and a bias [classes]"
        )
    names = [key[:100] for key in state if isinstance(key, str)]
    if any("blocks." in name for name in names):
        cause = "it looks like a backbone, whose place is --model"
    elif any("decode_head." in name for name in names) or "state_dict" in names:
        cause = "it looks like a depth or segmentation head"
    else:
        cause = f"it holds {', '.join(names[:3]) or 'nothing'}"
    raise WeightsError(f"{source} has no weight and bias of a linear classifier: {cause}; give the file of a head")


def _wanted(embed_dim: int, layers: int | None) -> str:
    one, four = f"{2 * embed_dim} for a 1-layer head", f"{5 * embed_dim} for a 4-layer head"
    wanted = {1: one, 4: four}.get(layers or 0, f"{one} or {four}")
    return f"this backbone of width {embed_dim} gives {wanted}"


def _likely_cause(width: int, embed_dim: int) -> str:
    for n in (1, 4):
        if width == (1 + n) * embed_dim:
            return f"it is a {n}-layer head: ask for layers={n}, or give the {5 - n}-layer file"
    for n in (1, 4):
        size = width // (1 + n)
        if width == (1 + n) * size and size in _SIZES:
            return f"it looks like the {n}-layer head of a {_SIZES[size]}, which is {size} wide"
    return "it was trained on other features, perhaps of another backbone"
