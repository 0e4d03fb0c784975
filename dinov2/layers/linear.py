"""Names that dinov2.hf imports until it calls its modules."""

from torch import Tensor, nn

from dinov2.layers import kernels

__all__ = ["is_plain", "project"]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is an untouched linear layer."""
    return kernels.is_untouched(layer, nn.Linear)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """The same as `kernels.project`."""
    return kernels.project(layer, x)
