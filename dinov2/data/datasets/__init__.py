"""Data sets: each is a sequence of `(image, target)` that knows paths and labels.

`base` holds the contract; `dinov2.data.make_dataset` builds any of them from a string.
"""

from dinov2.data.datasets.image_net import ImageNet, ImageNet22k

__all__ = ["ImageNet", "ImageNet22k"]
