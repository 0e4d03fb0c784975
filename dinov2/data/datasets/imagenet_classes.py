"""Names, identifiers and numbers of the classes of ImageNet, for every data set that has such classes.

The table of ImageNet-1k is the file `imagenet_classes.txt` beside this module, in the form of the data set's
`labels.txt` (`wnid,name` a line); it is read at its first use. The number of a class is the rank of its wnid.
Names are those of torchvision's weights, all different (`crane` lifts, `crane bird` flies).
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from dinov2.data.datasets.base import read_bytes
from dinov2.errors import DataError

__all__ = ["IMAGENET_CLASSES", "ImageNetClass", "infer_class_ids", "name_classes", "number_of_wnid", "read_labels_txt"]


class ImageNetClass(NamedTuple):
    """The identifier of a class's folder, and its name in words."""

    wnid: str
    """WordNet's identifier, such as n01440764."""
    name: str
    """Such as tench."""


IMAGENET_CLASSES: tuple[ImageNetClass, ...]
"""All 1,000 classes; class number i is row i."""


def __getattr__(name: str) -> object:
    if name == "IMAGENET_CLASSES":
        return _read()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _read() -> tuple[ImageNetClass, ...]:
    lines = files("dinov2.data.datasets").joinpath("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.partition(",") for line in lines]
    if len(rows) != 1000:
        raise DataError(f"the packaged table of ImageNet's classes has {len(rows)} rows, not 1000; install dinov2 anew")
    return tuple(ImageNetClass(wnid, name) for wnid, _, name in rows)


@cache
def _numbers() -> dict[str, int]:
    return {row.wnid: number for number, row in enumerate(_read())}


def number_of_wnid(wnid: str) -> int | None:
    """Number of a wnid among the 1,000 classes; None for any other text."""
    return _numbers().get(wnid)


def name_classes(root: str, class_ids: Sequence[str]) -> list[str]:
    """Names by wnid from `root/labels.txt`, else from the built-in table; a wnid that has no name stands for itself."""
    names = read_labels_txt(root) or dict(_read())
    return [names.get(class_id, class_id) for class_id in class_ids]


def read_labels_txt(root: str) -> dict[str, str]:
    """Names by wnid in `root/labels.txt` (`wnid,name`; all after the first comma is the name); empty without it."""
    path = os.path.join(root, "labels.txt")
    if not os.path.isfile(path):
        return {}
    lines = read_bytes(path).decode("utf-8-sig", errors="replace").splitlines()
    rows = [line.partition(",") for line in lines]
    return {_unquoted(class_id): _unquoted(name) for class_id, comma, name in rows if comma}


def _unquoted(cell: str) -> str:
    """A cell of a CSV row: without the quotes around it, and with those inside it no longer doubled."""
    cell = cell.strip()
    return cell[1:].removesuffix('"').replace('""', '"') if cell.startswith('"') else cell


def infer_class_ids(dataset: object) -> list[str] | None:
    """The identifier of class 0, 1, ... of a data set; None where its classes are not ImageNet's.

    Sets that know their `class_ids` are believed. For others, such as folders, a name that is an identifier or that of
    a class of ImageNet-1k tells; names beside it that are neither stand for themselves. Names that occur twice tell
    nothing.
    """
    if (class_ids := getattr(dataset, "class_ids", None)) is not None:
        return [str(class_id) for class_id in class_ids]
    names = list(getattr(dataset, "class_names", None) or ())
    by_name = {row.name: row.wnid for row in _read()}
    if len(set(names)) < len(names) or not any(name in by_name or name in _numbers() for name in names):
        return None
    return [name if name in _numbers() else by_name.get(name, name) for name in names]
