"""The 1,000 classes of ImageNet-1k in the order in which classifiers count them: wnid and name.

A class's number is the rank of its wnid. The table is the file `imagenet_classes.txt` beside this module, in the form
of the data set's own `labels.txt` (`wnid,name` a line); it is read when it is first asked for. Names are those of
torchvision's weights, all different (`crane` lifts, `crane bird` flies).
"""

from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from dinov2.errors import DataError

__all__ = ["IMAGENET_CLASSES", "ImageNetClass"]


class ImageNetClass(NamedTuple):
    """One class: the identifier of its folder, and its name in words."""

    wnid: str
    """WordNet's identifier, such as n01440764."""
    name: str
    """Such as tench."""


IMAGENET_CLASSES: tuple[ImageNetClass, ...]
"""All 1,000 classes; class number i is row i."""


def __getattr__(name: str) -> Any:
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
