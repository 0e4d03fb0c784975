"""Features that know nothing: what a trained model has to beat.

Raw pixels under cosine similarity are a stronger baseline than they look: 45.4 % top-1 on JPEG copies of CIFAR-10 by
k-NN with k = 20 and temperature 0.07 (41.6 % with k = 200). The other baseline, an untrained backbone, is a model like
any other.
"""

from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

__all__ = ["RawPixels"]


class RawPixels(nn.Module):
    """Normalised images [B, C, H, W] to L2-normalised pixels [B, C*h*w].

    Images whose longer side exceeds `max_size` are shrunk to it first, antialiased, which bounds the memory. The
    channel normalisation is that of the transform before: cosine similarity needs pixels centred about zero, or
    brightness decides alone (36 instead of 45 % on the same images).
    """

    def __init__(self, *, max_size: int = 32) -> None:
        super().__init__()
        self.max_size = max_size

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        height, width = images.shape[-2:]
        shrink = self.max_size / max(height, width)
        if shrink < 1:
            size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
            images = interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return normalize(images.flatten(1), dim=1)

    def extra_repr(self) -> str:
        return f"max_size={self.max_size}"
