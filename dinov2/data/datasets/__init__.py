"""Data sets: each is a sequence of `(image, target)` that knows paths and labels.

`base` holds the contract; `dinov2.data.loaders.make_dataset` builds any of them from a string.
"""

from dinov2.data.datasets.base import EncodedDataset, FileDataset, ImageDataset, PixelDataset, Subset
from dinov2.data.datasets.cifar import Cifar10
from dinov2.data.datasets.files import Folder, ImageFiles
from dinov2.data.datasets.image_net import ImageNet, ImageNet22k
from dinov2.data.datasets.imagenet_variants import (
    ImageNetA,
    ImageNetC,
    ImageNetR,
    ImageNetReaL,
    ImageNetSketch,
    ImageNetV2,
)
from dinov2.data.datasets.listing import ListFile
from dinov2.data.datasets.toy import Toy

__all__ = [
    "Cifar10",
    "EncodedDataset",
    "FileDataset",
    "Folder",
    "ImageDataset",
    "ImageFiles",
    "ImageNet",
    "ImageNet22k",
    "ImageNetA",
    "ImageNetC",
    "ImageNetR",
    "ImageNetReaL",
    "ImageNetSketch",
    "ImageNetV2",
    "ListFile",
    "PixelDataset",
    "Subset",
    "Toy",
]
