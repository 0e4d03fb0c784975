"""Cuts an image into patches and projects each to a token."""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.linear import linear
from dinov2.layers.recording import is_recording

__all__ = ["PatchEmbed", "patch_tokens"]


def patch_tokens(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[B, C, H, W]` and a kernel `[D, C, p, p']` -> `[B, h*w, D]`, patches row by row.

    One matrix product over unfolded patches instead of a convolution with stride p: the same sums, and faster on CPUs,
    where the convolution's backward would spend its time in layout changes.
    """
    rows, columns = weight.shape[-2:]
    batch, channels, height, width = images.shape
    grid = (height // rows, width // columns)
    patches = images.reshape(batch, channels, grid[0], rows, grid[1], columns)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid[0] * grid[1], channels * rows * columns)
    return linear(patches, weight.flatten(1), bias)


class PatchEmbed(nn.Module):
    """Image `[B, C, H, W]` -> patch tokens `[B, h*w, D]`, or `[B, h, w, D]` with `flatten_embedding=False`.

    `img_size` only records the native size. Raises `ValueError` with the nearest sizes when a side is no multiple of
    the patch size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        if self.patch_size[0] != self.patch_size[1]:
            raise ValueError(f"patch_size is {patch_size}; patches must be square")
        self.patches_resolution = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, h*w, D]` (or `[B, h, w, D]`)."""
        height, width = x.shape[-2:]
        self._check(x)
        tokens = self.norm(patch_tokens(x, self.proj.weight, self.proj.bias))
        if self.flatten_embedding:
            return tokens
        size = self.patch_size[0]
        return tokens.unflatten(1, (height // size, width // size))

    def _check(self, x: Tensor) -> None:
        if is_recording():
            return
        if x.shape[1] != self.in_chans:
            raise ValueError(f"images have {x.shape[1]} channels; this model was built for in_chans={self.in_chans}")
        for side, pixels, patch in zip(("height", "width"), x.shape[-2:], self.patch_size, strict=True):
            if pixels % patch:
                below, above = pixels // patch * patch, (pixels // patch + 1) * patch
                sizes = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"image {side} {pixels} is no multiple of the patch size {patch}; resize to {sizes}")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)
