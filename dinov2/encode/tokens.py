"""Tokens of images, the same for every kind of model: class token, registers, a grid of patches, layers on request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.errors import ConfigError, DataError
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "ImageFeatures",
    "Tokens",
    "as_float32_on_cpu",
    "backbone_tokens",
    "packed_tokens",
    "require_finite",
    "split_tokens",
]


class Tokens(NamedTuple):
    """Tokens of a batch of equally large images, after the final norm of the model."""

    cls: Tensor
    """[B, D]; for models without a class token the mean over the patches."""
    registers: Tensor
    """[B, R, D], R = 0 for models without registers."""
    patches: Tensor
    """[B, h, w, D]."""
    layers: "dict[int, Tokens]"
    """The same of the blocks that were asked for, under the index that was given."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """`function` on every tensor."""
        layers = {index: tokens.map(function) for index, tokens in self.layers.items()}
        return Tokens(function(self.cls), function(self.registers), function(self.patches), layers)

    @classmethod
    def from_output(cls, output: Mapping[str, Tensor], grid: tuple[int, int]) -> "Tokens":
        """Of the dictionary of `forward_features`; registers may be missing."""
        class_token = output["x_norm_clstoken"]
        registers = output.get("x_norm_regtokens")
        if registers is None:
            registers = class_token.new_zeros(len(class_token), 0, class_token.shape[-1])
        return cls(class_token, registers, output["x_norm_patchtokens"].unflatten(1, grid), {})


@dataclass(frozen=True)
class ImageFeatures:
    """Tokens of one image, float32, on the CPU."""

    cls: Tensor
    """[D]."""
    registers: Tensor
    """[R, D]."""
    patches: Tensor
    """[h, w, D]."""
    size: tuple[int, int]
    """Height and width in pixels of what the model saw: `(h * patch, w * patch)`."""
    layers: "dict[int, ImageFeatures]" = field(default_factory=dict)
    """The same of the blocks that were asked for, under the index that was given."""

    @classmethod
    def of(cls, tokens: Tokens, row: int, size: tuple[int, int]) -> "ImageFeatures":
        """Image number `row` of a batch."""
        layers = {index: ImageFeatures.of(layer, row, size) for index, layer in tokens.layers.items()}
        # Copies: a view would keep the whole batch in memory for as long as one of its images is kept.
        class_token, registers, patches = (part[row].clone() for part in tokens[:3])
        return cls(class_token, registers, patches, size, layers)


def backbone_tokens(model: DinoVisionTransformer, images: Tensor, layers: Sequence[int] = ()) -> Tokens:
    """Tokens of images `[B, C, H, W]`; `layers` are block indices, negative ones count from the end.

    Raises `ConfigError` for a block that the model does not have.
    """
    grid = model.patch_grid(*images.shape[-2:])
    if not layers:
        return Tokens.from_output(model.forward_features(images), grid)
    depth, last = model.n_blocks, model.n_blocks - 1
    blocks = {index: index + depth if index < 0 else index for index in layers}
    if wrong := [index for index, block in blocks.items() if not 0 <= block < depth]:
        raise ConfigError(f"there is no block {wrong[0]}; this model has blocks 0 to {last}")
    # The last block is always computed: it holds the tokens that every caller wants.
    indices = sorted({*blocks.values(), last})
    outputs = model.get_intermediate_layers(images, indices, return_class_token=True, return_register_tokens=True)
    tokens = {
        index: Tokens(class_token, registers, patches.unflatten(1, grid), {})
        for index, (patches, class_token, registers) in zip(indices, outputs, strict=True)
    }
    return tokens[last]._replace(layers={index: tokens[block] for index, block in blocks.items()})


def packed_tokens(model: DinoVisionTransformer, images: Sequence[Tensor]) -> list[Tokens]:
    """Tokens of batches `[B_i, C, H_i, W_i]` of different sizes, from one packed pass."""
    return [
        Tokens.from_output(output, model.patch_grid(*batch.shape[-2:]))
        for batch, output in zip(images, model.forward_features(list(images)), strict=True)
    ]


def split_tokens(sequence: Tensor, grid: tuple[int, int], *, has_cls: bool) -> Tokens:
    """A sequence `[B, T, D]` whose last `h * w` tokens are patches, cut into its parts.

    Raises `ConfigError` when there are fewer tokens than patches.
    """
    n_patches = grid[0] * grid[1]
    first_patch = sequence.shape[1] - n_patches
    if first_patch < int(has_cls):
        raise ConfigError(
            f"the model gave {sequence.shape[1]} tokens for a grid of {grid[0]} x {grid[1]} patches; "
            "it is no plain vision transformer and cannot be used here"
        )
    patches = sequence[:, first_patch:]
    cls = sequence[:, 0] if has_cls else patches.mean(dim=1)
    return Tokens(cls, sequence[:, int(has_cls) : first_patch], patches.unflatten(1, grid), {})


def require_finite(features: Tensor, *, model: str = "the model", what: str = "features", of: str = "images") -> None:
    """Raise `DataError` when a row of features `[S, ...]` is NaN or infinite; `of` says what the rows belong to."""
    # A sum is not finite when a value is not, and much quicker to have.
    if bool(features.sum().isfinite()):
        return
    broken = int((~features.flatten(1).isfinite().all(dim=1)).sum())
    if broken:
        raise DataError(
            f"{model} gives NaN or infinite {what} for {broken:,} of {len(features):,} {of}; try --precision fp32, or "
            "look whether its training diverged"
        )


def as_float32_on_cpu(tokens: Tokens) -> Tokens:
    """Tokens for keeping: float32, on the CPU."""
    return tokens.map(lambda tensor: tensor.to("cpu", torch.float32))
