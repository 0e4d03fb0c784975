"""From pixels to tokens: patch projection, masks, class token, position embeddings, registers."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2.layers.patch_embed import patch_tokens
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.layers.recording import is_recording

__all__ = [
    "Dinov2Embeddings",
    "Dinov2PatchEmbeddings",
    "Dinov2WithRegistersEmbeddings",
    "Dinov2WithRegistersPatchEmbeddings",
    "position_rule",
]


class Dinov2PatchEmbeddings(nn.Module):
    """Images `[B, C, H, W]` -> patch tokens `[B, N, D]`; what is left of a side beyond whole patches is not seen."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.image_size = _pair(config.image_size)
        self.patch_size = _pair(config.patch_size)
        self.grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, N, D]`. Raises `ValueError` for other channels, or images below one patch."""
        self._check(pixel_values)
        layer = self.projection
        hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
        if type(layer) is not nn.Conv2d or hooked:
            tokens: Tensor = layer(pixel_values).flatten(2).transpose(1, 2)
            return tokens
        rows, columns = self.patch_size
        height, width = pixel_values.shape[-2] // rows * rows, pixel_values.shape[-1] // columns * columns
        return patch_tokens(pixel_values[..., :height, :width], layer.weight, layer.bias)

    def _check(self, pixel_values: Tensor) -> None:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; give a batch [B, C, H, W], "
                "for one image pixel_values[None]"
            )
        if is_recording():
            return
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"expected {self.num_channels} channels (config.num_channels) but got {pixel_values.shape[1]}; "
                "pixel_values is [B, C, H, W]"
            )
        for side, pixels, patch in zip(("height", "width"), pixel_values.shape[-2:], self.patch_size, strict=True):
            if pixels < patch:
                raise ValueError(f"image {side} {pixels} is smaller than a patch of {patch} pixels; resize the images")


class Dinov2Embeddings(nn.Module):
    """Pixels and masks -> tokens `[B, T, D]`: class token, registers (where the config has them), patches."""

    _patch_embeddings_class: ClassVar[type[Dinov2PatchEmbeddings]] = Dinov2PatchEmbeddings

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.use_mask_token = getattr(config, "use_mask_token", True)
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if self.use_mask_token else None
        self.num_register_tokens = getattr(config, "num_register_tokens", 0)
        if hasattr(config, "num_register_tokens"):
            self.register_tokens = nn.Parameter(torch.zeros(1, self.num_register_tokens, width))
        self.patch_embeddings = self._patch_embeddings_class(config)
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + self.patch_embeddings.num_patches, width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.patch_size = config.patch_size

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` -> `[B, T, D]`; patches where the mask `[B, N]` is True (or not 0) become the mask token."""
        weight = self.patch_embeddings.projection.weight
        # Quantised weights have no type that pixels could take.
        pixels = pixel_values.to(weight.dtype) if weight.is_floating_point() else pixel_values
        patches = self.patch_embeddings(pixels)  # [B, N, D]
        if bool_masked_pos is not None:
            patches = self._masked(patches, bool_masked_pos)
        position = self._position(self._grid(pixel_values))  # under autocast of a wider type than the patches
        cls_token: Tensor = self.cls_token
        if self.mask_token is not None and self.training and bool_masked_pos is None and not is_recording():
            # A gradient of zero for the mask token: processes that train together expect one for every parameter.
            cls_token = cls_token + 0.0 * self.mask_token
        tokens = [cls_token.expand(patches.shape[0], -1, -1) + position[:, :1], patches + position[:, 1:]]
        if self.num_register_tokens:
            tokens.insert(1, self.register_tokens.expand(patches.shape[0], -1, -1))
        embedded: Tensor = self.dropout(torch.cat(tokens, dim=1))
        return embedded

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings `[1, 1+N, D]` for images of `height` x `width` pixels."""
        rows, columns = self.patch_embeddings.patch_size
        return self._position((height // rows, width // columns)).to(embeddings.dtype)

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        rows, columns = self.patch_embeddings.patch_size
        return pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns

    def _position(self, grid: tuple[int, int]) -> Tensor:
        return resize_pos_embed(
            self.position_embeddings, self.patch_embeddings.grid, grid, **position_rule(self.config)
        ).to(self.position_embeddings.dtype)

    def _masked(self, patches: Tensor, mask: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos was given, but this model has no mask token (use_mask_token=False in its config); "
                "build it with use_mask_token=True or leave the mask out"
            )
        if mask.shape != patches.shape[:2]:
            raise ValueError(
                f"bool_masked_pos has shape {list(mask.shape)}; give [B, N] = {list(patches.shape[:2])}, "
                "patches row by row"
            )
        return torch.where((mask.to(patches.device) != 0)[..., None], self.mask_token.to(patches.dtype)[None], patches)


class Dinov2WithRegistersPatchEmbeddings(Dinov2PatchEmbeddings):
    """The same for models with registers."""


class Dinov2WithRegistersEmbeddings(Dinov2Embeddings):
    """The same for models with registers, which stand between class token and patches and have no position."""

    _patch_embeddings_class = Dinov2WithRegistersPatchEmbeddings


def position_rule(config: Any) -> dict[str, Any]:
    """Offset and antialias of the resize: those of the stock class, or (`original`) those of the weights' training."""
    registers = hasattr(config, "num_register_tokens")
    if config.position_interpolation == "hf":
        return {"offset": 0.0, "antialias": registers}
    return {
        "offset": float(getattr(config, "interpolate_offset", 0.0 if registers else 0.1)),
        "antialias": bool(getattr(config, "interpolate_antialias", registers)),
    }


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
