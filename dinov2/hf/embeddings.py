"""From pixels to tokens: patch projection, masks, class token, position embeddings, registers."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2.layers.kernels import cuts_patches, is_untouched, patch_products
from dinov2.layers.patch_embed import patch_grid
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.layers.recording import is_recording

__all__ = [
    "Dinov2Embeddings",
    "Dinov2PatchEmbeddings",
    "Dinov2WithRegistersEmbeddings",
    "Dinov2WithRegistersPatchEmbeddings",
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
        # Quantised weights have no type that pixels could take.
        dtypes = [parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()]
        pixels = pixel_values.to(dtypes[0]) if dtypes else pixel_values
        if is_untouched(layer, nn.Conv2d) and cuts_patches(layer):
            rows, columns = layer.kernel_size
            height, width = pixels.shape[-2] // rows * rows, pixels.shape[-1] // columns * columns
            pixels = pixels[..., :height, :width]
        return patch_products(layer, pixels).flatten(2).transpose(1, 2)

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
        sides = pixel_values.shape[-2:]
        for side, pixels, patch, patches in zip(
            ("height", "width"),
            sides,
            self.patch_size,
            patch_grid(self.projection, self.patch_size, *sides),
            strict=True,
        ):
            if patches < 1:
                raise ValueError(f"image {side} {pixels} is smaller than a patch of {patch} pixels; resize the images")


class Dinov2Embeddings(nn.Module):
    """Pixels and masks -> tokens `[B, T, D]`: class token, registers (where the family has them), patches."""

    _patch_embeddings_class: ClassVar[type[Dinov2PatchEmbeddings]] = Dinov2PatchEmbeddings
    _has_registers: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.use_mask_token = self._has_registers or getattr(config, "use_mask_token", True)
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if self.use_mask_token else None
        self.num_register_tokens = config.num_register_tokens if self._has_registers else 0
        if self._has_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.num_register_tokens, width))
        self.patch_embeddings = self._patch_embeddings_class(config)
        self.native_grid = self.patch_embeddings.grid
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + self.patch_embeddings.num_patches, width))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.patch_size = config.patch_size

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` -> `[B, T, D]`; patches where the mask `[B, N]` is True (or not 0) become the mask token."""
        patches = self.patch_embeddings(pixel_values)  # [B, N, D]
        if bool_masked_pos is not None:
            patches = self._masked(patches, bool_masked_pos)
        cls_token: Tensor = self.cls_token
        if self.mask_token is not None and self.training and bool_masked_pos is None and not is_recording():
            # A gradient of zero for the mask token: processes that train together expect one for every parameter.
            cls_token = cls_token + 0.0 * self.mask_token
        tokens = torch.cat([cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if self.position_embeddings is not None:
            tokens = tokens + self.interpolate_pos_encoding(tokens, *pixel_values.shape[-2:])
        if self._has_registers:
            registers = self.register_tokens.expand(patches.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        embedded: Tensor = self.dropout(tokens)
        return embedded

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings `[1, 1+N, D]` for images of `height` x `width` pixels, of the type of `embeddings`."""
        position: Tensor = self.position_embeddings
        grid = self.patch_grid(height, width)
        resized = resize_pos_embed(position, self._position_grid(), grid, **self._position_rule())
        return resized.to(embeddings.dtype)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in images of `height` x `width` pixels."""
        patch_size = getattr(self.patch_embeddings, "patch_size", self.patch_size)
        return patch_grid(getattr(self.patch_embeddings, "projection", None), patch_size, height, width)

    def _position_grid(self) -> tuple[int, int]:
        """The grid of `position_embeddings`: that of the config, or a square one where they were replaced."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            with warnings.catch_warnings():  # a trace takes sizes for tensors, and warns that this one is a constant
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
                n_positions = int(self.position_embeddings.shape[1]) - 1
        else:
            n_positions = self.position_embeddings.shape[1] - 1
        rows, columns = self.native_grid
        if rows * columns == n_positions:
            return rows, columns
        side = math.isqrt(n_positions)
        if side * side != n_positions:
            raise ValueError(
                f"position_embeddings has {n_positions} patches, which is neither the grid {rows} x {columns} of the "
                "config nor a square; set config.image_size and build the model again"
            )
        return side, side

    def _position_rule(self) -> dict[str, Any]:
        """Offset and antialias of the resize: those of the stock class, or (`original`) of the weights' training."""
        registers = self._has_registers
        if getattr(self.config, "position_interpolation", "hf") == "hf":  # a config of transformers does not have it
            return {"offset": 0.0, "antialias": registers}
        return {
            "offset": float(getattr(self.config, "interpolate_offset", 0.0 if registers else 0.1)),
            "antialias": bool(getattr(self.config, "interpolate_antialias", registers)),
        }

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
    _has_registers = True


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
