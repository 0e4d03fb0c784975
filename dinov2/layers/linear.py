"""Names that dinov2.hf still imports."""

from torch import nn

from dinov2.layers.kernels import is_untouched, linear, project

__all__ = ["is_plain", "linear", "project"]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is an untouched linear layer."""
    return is_untouched(layer, nn.Linear)
