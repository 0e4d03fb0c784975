"""Data sets by name and batches from them: the dataset strings and `make_data_loader` of the public release.

A string is a path, or `Name:key=value:...`; what exists as a path is a path, as a whole and as a value, before the
grammar is looked at. Elsewhere `:` and `=` are written percent-encoded (`%3A`, `%3D`). `DATASETS` is the one table of
names; what is wrong with a string is said with the nearest thing that would be right.
"""

import difflib
import glob
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Unpack
from urllib.parse import unquote

from dinov2.data.datasets.base import ImageDataset, Subset, Transforms
from dinov2.data.datasets.cifar import Cifar10
from dinov2.data.datasets.files import Folder, glob_images
from dinov2.data.datasets.image_net import ImageNet, ImageNet22k
from dinov2.data.datasets.imagenet_variants import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    ImageNetA,
    ImageNetC,
    ImageNetR,
    ImageNetReaL,
    ImageNetSketch,
    ImageNetV2,
)
from dinov2.data.datasets.listing import ListFile, rows_by_name
from dinov2.data.datasets.toy import Toy
from dinov2.errors import DataError

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "make_dataset",
    "parse_dataset_str",
]

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class _DatasetKind:
    """A row of the table: name, constructor and options of a data set."""

    name: str
    build: Callable[..., ImageDataset]
    keys: tuple[str, ...]
    """Accepted keys; the first `required` of them have no default."""
    required: int
    example: str
    choices: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By key with few values: the accepted ones, in any case, and what `build` gets for them."""


class DatasetSpec(NamedTuple):
    """A parsed string: the table's row and the arguments of its `build`."""

    kind: _DatasetKind
    arguments: dict[str, object]


# CIFAR's test batch is everybody's validation set.
_CIFAR_SPLITS = {"TRAIN": "TRAIN", "VAL": "VAL", "TEST": "VAL"}

DATASETS = (
    _DatasetKind("folder", Folder, ("root",), 1, "folder:PATH, or just PATH"),
    _DatasetKind("list", ListFile, ("file",), 1, "list:FILE with a .txt, .csv or .tsv file of image paths"),
    _DatasetKind("glob", glob_images, ("pattern",), 1, "glob:PATTERN, or just a pattern such as 'photos/**/*.jpg'"),
    _DatasetKind(
        "ImageNet",
        ImageNet,
        ("split", "root", "extra", "subset"),
        2,
        "ImageNet:split=TRAIN:root=PATH:extra=PATH",
        {"split": {split.name: split for split in ImageNet.Split}},
    ),
    _DatasetKind("ImageNet22k", ImageNet22k, ("root", "extra"), 1, "ImageNet22k:root=PATH:extra=PATH"),
    *(_DatasetKind(s.kind, s, ("root",), 1, f"{s.kind}:root=PATH") for s in (ImageNetA, ImageNetR, ImageNetSketch)),
    _DatasetKind(
        "ImageNetV2",
        ImageNetV2,
        ("root", "variant"),
        1,
        "ImageNetV2:root=PATH:variant=matched-frequency",
        {"variant": {name: name for name in ImageNetV2.variants}},
    ),
    _DatasetKind(
        "ImageNetC",
        ImageNetC,
        ("root", "corruption", "severity"),
        1,
        "ImageNetC:root=PATH:corruption=fog:severity=3",
        {
            "corruption": {"all": None} | {name: name for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS)},
            "severity": {"all": None} | {str(level): level for level in SEVERITIES},
        },
    ),
    _DatasetKind("ImageNetReaL", ImageNetReaL, ("root", "labels", "extra"), 1, "ImageNetReaL:root=PATH:labels=FILE"),
    _DatasetKind("cifar10", Cifar10, ("root", "split"), 1, "cifar10:root=PATH:split=TRAIN", {"split": _CIFAR_SPLITS}),
    _DatasetKind("toy", Toy, ("split", "size", "n"), 0, "toy:split=TRAIN", {"split": {"TRAIN": "TRAIN", "VAL": "VAL"}}),
)
"""Every data set that a string can name."""

_PATH_KEYS = {"root", "extra", "file", "labels", "subset"}
_NUMBER_KEYS = {"size", "n"}
_MOST_DIGITS = 10
_LIST_EXTENSIONS = (".txt", ".csv", ".tsv")


def parse_dataset_str(dataset_str: str) -> DatasetSpec:
    """Parse a dataset string, without reading any data.

    Raises DataError naming the token that is wrong, the nearest right one and the accepted ones.
    """
    if os.path.exists(os.path.expanduser(dataset_str)):
        return _parse_path(os.path.expanduser(dataset_str))
    name, colon, rest = dataset_str.partition(":")
    kinds = {kind.name.lower(): kind for kind in DATASETS}
    if name.lower() not in kinds and glob.has_magic(dataset_str):
        return DatasetSpec(kinds["glob"], {"pattern": dataset_str})
    if "://" in dataset_str:
        raise DataError(
            f"{dataset_str!r} is an address, and images are not fetched; download them, and give their folder"
        )
    if name.lower() not in kinds:
        if not name or "\\" in name or "/" in name or name.startswith((".", "~")) or (colon and len(name) == 1):
            raise DataError(
                f"the data set path {dataset_str!r} does not exist; give a folder of images, "
                f"or one of: {'; '.join(kind.example for kind in DATASETS)}"
            )
        nearest = _nearest(name, [kind.name for kind in DATASETS])
        raise DataError(
            f"{dataset_str!r} is no existing path, and {name!r} is no known data set{nearest}; "
            f"known are {', '.join(kind.name for kind in DATASETS)}"
        )
    kind = kinds[name.lower()]
    arguments = _parse_arguments(kind, rest, dataset_str)
    missing = [key for key in kind.keys[: kind.required] if key not in arguments]
    if missing:
        raise DataError(f"the data set {dataset_str!r} lacks {' and '.join(missing)}; write {kind.example}")
    return DatasetSpec(kind, arguments)


def make_dataset(dataset_str: str, **transforms: Unpack[Transforms]) -> ImageDataset:
    """The data set that a string names, with its length known, so that a wrong one fails here.

    Raises DataError for a string that cannot be understood and for data that are missing or empty.
    """
    kind, arguments = parse_dataset_str(dataset_str)
    subset = arguments.pop("subset", None)  # a choice among the images, so no data set needs to know of it
    dataset = kind.build(**arguments, **transforms)
    if subset is not None:
        dataset = Subset(dataset, rows_by_name(dataset, str(subset)), **transforms)
    logger.debug("data set %s: %s images", dataset_str, f"{len(dataset):,}")
    return dataset


def _parse_path(path: str) -> DatasetSpec:
    kinds = {kind.name: kind for kind in DATASETS}
    if os.path.isdir(path):
        return DatasetSpec(kinds["folder"], {"root": path})
    if path.lower().endswith(_LIST_EXTENSIONS):
        return DatasetSpec(kinds["list"], {"file": path})
    raise DataError(
        f"the data set path {path!r} is a file and no list of images (.txt, .csv or .tsv); "
        f"give the folder that holds the images"
    )


def _parse_arguments(kind: _DatasetKind, rest: str, dataset_str: str) -> dict[str, object]:
    key, equals, _ = rest.partition("=")
    known_key = equals and any(key in other.keys for other in DATASETS)
    if len(kind.keys) == 1 and rest and (os.path.exists(rest) or not known_key):
        return {kind.keys[0]: _value(kind, kind.keys[0], rest, dataset_str)}  # folder:PATH, list:FILE
    arguments: dict[str, object] = {}
    tokens = rest.split(":") if rest else []
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.partition("=")
        if not equals:
            raise DataError(
                f"{token!r} in {dataset_str!r} is no key=value; accepted keys are {', '.join(kind.keys)}, "
                f"and ':' inside a value is written %3A"
            )
        if key not in kind.keys:
            raise DataError(
                f"the key {key!r} in {dataset_str!r} is unknown to {kind.name}{_nearest(key, kind.keys)}; "
                f"accepted keys are {', '.join(kind.keys)}"
            )
        if key in arguments:
            raise DataError(f"the key {key!r} stands in {dataset_str!r} twice; leave one out")
        if key in _PATH_KEYS:
            if len(value) == 1 and value.isalpha() and tokens and tokens[0][:1] in ("", "\\", "/"):
                value = f"{value}:{tokens.pop(0)}"  # a drive of Windows
            for end in range(len(tokens), 0, -1):  # the longest existing path wins over the grammar
                if os.path.exists(":".join([value, *tokens[:end]])):
                    value, tokens = ":".join([value, *tokens[:end]]), tokens[end:]
                    break
        arguments[key] = _value(kind, key, value, dataset_str)
    return arguments


def _value(kind: _DatasetKind, key: str, text: str, dataset_str: str) -> object:
    if key in _PATH_KEYS:
        if not text:
            raise DataError(f"{key} in {dataset_str!r} is empty; write {kind.example}")
        path = text if os.path.exists(text) else os.path.expanduser(unquote(text))
        if key != "extra" and not os.path.exists(path):  # extra is made by dump_extra
            raise DataError(f"{key} of {dataset_str!r} does not exist: there is no {path}")
        return path
    if key == "pattern":
        return text
    text = unquote(text)
    if key in _NUMBER_KEYS:
        if not (text.isascii() and text.isdecimal() and len(text) < _MOST_DIGITS):
            raise DataError(f"{key} in {dataset_str!r} is {text!r}; write a whole number")
        return int(text)
    by_lower = {name.lower(): value for name, value in kind.choices[key].items()}
    if text.lower() not in by_lower:
        raise DataError(
            f"the {key} {text!r} in {dataset_str!r} is unknown to {kind.name}{_nearest(text, kind.choices[key])}; "
            f"known are {', '.join(kind.choices[key])}"
        )
    return by_lower[text.lower()]


def _nearest(word: str, known: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f", the nearest is {by_lower[match[0]]!r}" if match else ""
