"""Where ImageNet's classes and labels come from when there is no metadata: folders, `labels.txt`, lists for flat val.

`labels.txt` is no part of the official archives, so it only supplies readable names here; without it they come from
the built-in table of ImageNet-1k, and a class that is not in it is called by its wnid.
"""

import os
import re
from collections.abc import Mapping

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.base import read_bytes
from dinov2.errors import DataError

__all__ = ["FLAT_VAL_LISTS", "class_folders", "class_names_of", "flat_val_labels"]

FLAT_VAL_LISTS = (
    "LOC_val_solution.csv",  # ImageId,PredictionString
    "imagenet_2012_validation_synset_labels.txt",  # a wnid a line, in order
    "val.txt",  # file name and class number from 0
    "val_labels.txt",  # any of these forms
)


def class_folders(root: str) -> list[str]:
    """The class folders of train and val, sorted: a class's number is its position."""
    found: set[str] = set()
    for split in ("train", "val"):
        folder = os.path.join(root, split)
        if os.path.isdir(folder):
            found.update(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    return sorted(found)


def class_names_of(root: str, class_ids: list[str]) -> list[str]:
    """Names by wnid from `root/labels.txt` (`wnid,name`; everything after the first comma is the name).

    Without that file they are those of the built-in table; a wnid that has no name stands for itself.
    """
    names = _labels_txt(root) or dict(imagenet_classes.IMAGENET_CLASSES)
    return [names.get(class_id, class_id) for class_id in class_ids]


def _labels_txt(root: str) -> dict[str, str]:
    path = os.path.join(root, "labels.txt")
    if not os.path.isfile(path):
        return {}
    names: dict[str, str] = {}
    for line in read_bytes(path).decode("utf-8-sig", errors="replace").splitlines():
        class_id, comma, name = line.partition(",")
        if comma:
            names[_unquoted(class_id)] = _unquoted(name)
    return names


def _unquoted(field: str) -> str:
    """A field of a CSV row: without the quotes around it, and with those inside it no longer doubled."""
    field = field.strip()
    return field[1:].removesuffix('"').replace('""', '"') if field.startswith('"') else field


def flat_val_labels(root: str, extra: str | None, folders: list[str]) -> tuple[list[str], Mapping[int, int]]:
    """Classes and the class number by image number, for validation images that lie in no class folders.

    One of `FLAT_VAL_LISTS` is looked for in `root`, `root/val` and `extra`. Classes are those of the train folders,
    else of `labels.txt`, else all of ImageNet-1k; a list with a wnid of none of these names its own. Raises DataError
    when there is no list or a line makes no sense.
    """
    places = [folder for folder in (root, os.path.join(root, "val"), extra) if folder]
    lists = [os.path.join(folder, name) for folder in places for name in FLAT_VAL_LISTS]
    path = next((path for path in lists if os.path.isfile(path)), None)
    if path is None:
        raise DataError(
            f"the validation images in {root}/val lie in no class folders and no list of their labels was found; "
            f"put one of {', '.join(FLAT_VAL_LISTS)} into {root}"
        )
    labels: dict[int, str] = {}
    for line in read_bytes(path).decode("utf-8-sig").splitlines():
        fields = re.split(r"[,\s]+", line.strip())
        if fields == [""] or fields[0] == "ImageId":
            continue
        if len(fields) == 1 and not fields[0].isdecimal():
            labels[len(labels) + 1] = fields[0]
            continue
        number = re.search(r"ILSVRC2012_val_(\d{8})", fields[0])
        if number is None or len(fields) < 2:
            # A bare number is refused: the official kit counts classes in another order than everybody else.
            raise DataError(f"{line!r} in {path} is no validation label; write ILSVRC2012_val_00000001.JPEG n01440764")
        labels[int(number.group(1))] = fields[1]
    by_wnid = any(not label.isdecimal() for label in labels.values())
    classes = folders or sorted(_labels_txt(root)) or [wnid for wnid, _ in imagenet_classes.IMAGENET_CLASSES]
    if by_wnid and not folders and not _labels_txt(root) and not set(labels.values()) <= set(classes):
        classes = sorted(set(labels.values()))
    rank = {class_id: index for index, class_id in enumerate(classes)}
    if not by_wnid:
        rank = {str(index): index for index in range(len(classes))}
    unknown = sorted(set(labels.values()) - set(rank))
    if unknown:
        raise DataError(
            f"{path} names the class {unknown[0]}, which is none of the {len(classes)} known ones; "
            f"add the train folders or a labels.txt with all classes to {root}"
        )
    return classes, {number: rank[label] for number, label in labels.items()}
