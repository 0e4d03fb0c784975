"""WordNet's identifier of each class of a data set: what tells that two sets mean the same class, whatever its name."""

from typing import Any

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.subset import Subset

__all__ = ["class_ids_of"]


def class_ids_of(dataset: Any) -> list[str] | None:
    """The identifier of class 0, 1, ... of a data set; None where its classes are not ImageNet's.

    Sets that know them are asked. For others, such as folders, a name that is an identifier or that of a class of
    ImageNet-1k tells; names beside it that are neither stand for themselves. Names that occur twice tell nothing.
    """
    if isinstance(dataset, Subset):
        return class_ids_of(dataset.dataset)
    if (known := getattr(dataset, "class_ids", None)) is not None:
        return [str(class_id) for class_id in known]
    names = list(getattr(dataset, "class_names", None) or ())
    if hasattr(dataset, "find_class_id"):
        return [str(dataset.find_class_id(number)) for number in range(len(names))] or None
    if len(set(names)) < len(names):
        return None
    by_name = {row.name: row.wnid for row in imagenet_classes.IMAGENET_CLASSES}
    known_ids = set(by_name.values())
    if not any(name in known_ids or name in by_name for name in names):
        return None
    return [name if name in known_ids else by_name.get(name, name) for name in names]
