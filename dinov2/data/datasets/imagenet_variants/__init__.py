"""The test sets made for classifiers of ImageNet-1k: A, R, Sketch, V2, C, and the reassessed labels of ReaL.

Each is read as its public archive unpacks, and knows which class of ImageNet-1k each of its own classes is
(`class_mapping`), so that the answers of a classifier of all 1,000 are chosen among them.
"""

from dinov2.data.datasets.imagenet_variants.class_folders import (
    ImageNetA,
    ImageNetR,
    ImageNetSketch,
    ImageNetTestSet,
    ImageNetV2,
)
from dinov2.data.datasets.imagenet_variants.class_ids import class_ids_of
from dinov2.data.datasets.imagenet_variants.corrupted import ImageNetC
from dinov2.data.datasets.imagenet_variants.real_labels import ImageNetReaL

__all__ = [
    "ImageNetA",
    "ImageNetC",
    "ImageNetR",
    "ImageNetReaL",
    "ImageNetSketch",
    "ImageNetTestSet",
    "ImageNetV2",
    "class_ids_of",
]
