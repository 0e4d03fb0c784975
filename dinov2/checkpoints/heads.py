"""Linear classifiers from head files, fitted to a backbone.

A head file is a bare `{"weight", "bias"}` and says nothing of itself; its width tells the number of blocks it reads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2.checkpoints.files import refuse_odd_tensors
from dinov2.errors import WeightsError
from dinov2.models.heads import LinearHead

__all__ = ["head_from_state"]

_PREFIXES = ("", "linear_head.", "classifier.")
_SIZES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1536: "ViT-g"}


def head_from_state(
    state: Mapping[str, object], *, embed_dim: int, layers: int | None = None, source: str = "the head file"
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


def _tensors(state: Mapping[str, object], source: str) -> tuple[Tensor, Tensor]:
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
