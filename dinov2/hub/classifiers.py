"""The released ImageNet classifiers as functions: a frozen backbone and a linear layer on its tokens.

Each returns a `LinearClassifier` as it was constructed, hence in training mode; call `.eval()`.
"""

from enum import Enum
from typing import Any, Protocol

from torch import Tensor, nn

from dinov2.checkpoints.files import read_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.hub.backbones import WrongArgument, file_behind, released_backbone
from dinov2.models.heads import LinearHead, linear_logits
from dinov2.models.releases import release
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "LinearClassifier",
    "Weights",
    "dinov2_vitb14_lc",
    "dinov2_vitb14_reg_lc",
    "dinov2_vitg14_lc",
    "dinov2_vitg14_reg_lc",
    "dinov2_vitl14_lc",
    "dinov2_vitl14_reg_lc",
    "dinov2_vits14_lc",
    "dinov2_vits14_reg_lc",
    "released_classifier",
]


class Weights(Enum):
    """Training data of the released heads."""

    IMAGENET1K = "IMAGENET1K"


class LinearClassifier(nn.Module):
    """Normalised images `[B, 3, H, W]` -> logits `[B, 1000]`, in ImageNet's usual order of classes.

    State dicts hold `backbone.*` and `linear_head.*`. `layers` is the number of blocks that the head reads, by default
    that of a `LinearHead`. To fine-tune, put any module in the place of `linear_head`: it gets `[B, (1+layers)*D]`.
    """

    def __init__(self, backbone: DinoVisionTransformer, linear_head: nn.Module, layers: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = linear_head
        self.layers = int(getattr(linear_head, "layers", 4)) if layers is None else layers

    def forward(self, x: Tensor) -> Tensor:
        """Logits; what the head reads is in `dinov2.models.heads`."""
        return linear_logits(self.backbone, self.linear_head, x, layers=self.layers)


def released_classifier(
    name: str,
    *,
    layers: int = 4,
    pretrained: bool = True,
    weights: Weights | str = Weights.IMAGENET1K,
    **kwargs: Any,
) -> LinearClassifier:
    """A classifier by the name of its `torch.hub` entry, with fresh weights or those of the release.

    Raises `WrongArgument` for `layers` other than 1 and 4 and as `released_backbone` does; `WeightsError` for a head
    that does not fit, `DinoError` when a file cannot be had.
    """
    if layers not in (1, 4):
        raise WrongArgument(f"Unsupported number of layers: {layers!r}; {name} reads 1 or 4 layers")
    backbone_name = name.removesuffix("_lc")
    file = file_behind(weights, Weights, release(f"{backbone_name}_linear{'4' if layers == 4 else ''}_head"))
    backbone = released_backbone(backbone_name, pretrained=pretrained, **kwargs)
    if not pretrained:
        return LinearClassifier(backbone, LinearHead(backbone.embed_dim, layers=layers))
    path = file.fetch()
    head = head_from_state(read_file(path), embed_dim=backbone.embed_dim, layers=layers, source=str(path))
    return LinearClassifier(backbone, head).train()


class _Entry(Protocol):
    def __call__(
        self,
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: Weights | str = Weights.IMAGENET1K,
        **kwargs: Any,
    ) -> LinearClassifier: ...


def _entry(name: str) -> _Entry:
    def entry(
        *, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs: Any
    ) -> LinearClassifier:
        return released_classifier(name, layers=layers, pretrained=pretrained, weights=weights, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""ImageNet classifier on `{name.removesuffix("_lc")}`.

    Args:
        layers: blocks whose class tokens the head reads, 1 or 4.
        pretrained: load the released backbone and head (False: fresh weights, nothing is fetched).
        weights: of the head: a member of `Weights` or its name, or the path or http address of another head file.
        kwargs: options of the backbone.

    Returns:
        The model, in training mode; call `.eval()`. Images `[B, 3, H, W]` -> logits `[B, 1000]`.
    """
    return entry


dinov2_vits14_lc = _entry("dinov2_vits14_lc")
dinov2_vitb14_lc = _entry("dinov2_vitb14_lc")
dinov2_vitl14_lc = _entry("dinov2_vitl14_lc")
dinov2_vitg14_lc = _entry("dinov2_vitg14_lc")
dinov2_vits14_reg_lc = _entry("dinov2_vits14_reg_lc")
dinov2_vitb14_reg_lc = _entry("dinov2_vitb14_reg_lc")
dinov2_vitl14_reg_lc = _entry("dinov2_vitl14_reg_lc")
dinov2_vitg14_reg_lc = _entry("dinov2_vitg14_reg_lc")
