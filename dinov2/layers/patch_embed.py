"""Cuts an image into patches and projects each to a token."""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.kernels import cuts_patches, patch_products
from dinov2.layers.recording import is_recording

__all__ = ["PatchEmbed", "make_2tuple", "patch_grid"]


class PatchEmbed(nn.Module):
    """Image `[B, C, H, W]` -> patch tokens `[B, h*w, D]`, or `[B, h, w, D]` with `flatten_embedding=False`.

    `img_size` only records the native size. `proj` is called whatever stands in its place, with whatever stride.
    Raises `ValueError` with the nearest sizes when a side is no multiple of the patch size.
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
        self.img_size = make_2tuple(img_size)
        self.patch_size = make_2tuple(patch_size)
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
        self._check(x)
        projected = patch_products(self.proj, x)  # [B, D, h, w]
        tokens: Tensor = self.norm(projected.flatten(2).transpose(1, 2))
        return tokens if self.flatten_embedding else tokens.unflatten(1, projected.shape[2:])

    def flops(self) -> int:
        """Multiply-adds at the native size: the projection, and one a number for the norm."""
        n_pixels = self.patch_size[0] * self.patch_size[1] * self.in_chans
        return self.num_patches * self.embed_dim * (n_pixels + 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of `height` x `width` pixels, by the stride of `proj`."""
        return patch_grid(self.proj, self.patch_size, height, width)

    def _check(self, x: Tensor) -> None:
        if is_recording():
            return
        if x.ndim != 4:
            raise ValueError(f"images have the shape {list(x.shape)}; give [B, C, H, W], one image as image[None]")
        if not x.dtype.is_floating_point:
            raise ValueError(f"images are {x.dtype}; give normalised floating-point pixels (dinov2.load has .features)")
        channels: object = getattr(self.proj, "in_channels", None)
        if isinstance(channels, int) and x.shape[1] != channels:
            raise ValueError(f"images have {x.shape[1]} channels; this model was built for in_chans={channels}")
        for side, pixels, patch in zip(("height", "width"), x.shape[-2:], self.patch_size, strict=True):
            if pixels % patch:
                below, above = pixels // patch * patch, (pixels // patch + 1) * patch
                sizes = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"image {side} {pixels} is no multiple of the patch size {patch}; resize to {sizes}")


def patch_grid(
    projection: nn.Module | None, patch_size: int | tuple[int, int], height: int, width: int
) -> tuple[int, int]:
    """Rows and columns of patches in an image of `height` x `width` pixels.

    By the convolution that projects them, also below an adapter; by `patch_size` where `projection` is none.
    """
    convolution: object = getattr(projection, "base_layer", projection)
    if not isinstance(convolution, nn.Conv2d):
        rows, columns = make_2tuple(patch_size)
        return height // rows, width // columns
    if cuts_patches(convolution):
        rows, columns = make_2tuple(convolution.kernel_size)
        return height // rows, width // columns
    padding = 0 if isinstance(convolution.padding, str) else convolution.padding
    settings = (convolution.kernel_size, convolution.stride, padding, convolution.dilation)
    rows, columns = (
        (pixels + 2 * pad - dilation * (kernel - 1) - 1) // step + 1
        for pixels, kernel, step, pad, dilation in zip((height, width), *map(make_2tuple, settings), strict=True)
    )
    return rows, columns


def make_2tuple(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Height and width from one number or from both."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)
