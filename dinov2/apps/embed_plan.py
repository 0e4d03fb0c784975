"""What is to be embedded, and what it becomes: checked and planned before anything is computed."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.files import Folder, ImageFiles
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.data.eval_transform import EvalTransform, Fit
from dinov2.data.loaders import make_dataset
from dinov2.encode.embedding import Wanted
from dinov2.encode.store.arrow import pyarrow_module
from dinov2.encode.store.writing import FORMATS, TableFormat, format_of
from dinov2.errors import ConfigError, DataError
from dinov2.pretrained import Pretrained

__all__ = [
    "Target",
    "check_place",
    "image_source",
    "planned_columns",
    "rows_of_a_part",
    "target_of",
    "transform_of",
    "wanted_of",
]

_MOST_ROWS = 8192  # of a part
_LEAST_ROWS = 256
_PARTS = 16  # that a small set is cut into, so that a kill costs little
_MOST_BYTES = 512 << 20  # of a part


def image_source(source: str | Sequence[str]) -> ImageDataset:
    """The images that a user named: one folder, list, glob or data set string, or image files one by one."""
    names = [source] if isinstance(source, str) else list(source)
    if not names or not names[0]:
        raise DataError("no images were named; give a folder, a list, a pattern or image files")
    if len(names) == 1 and not (os.path.isfile(names[0]) and Path(names[0]).suffix.lower() in IMAGE_EXTENSIONS):
        return make_dataset(names[0])
    if folders := [name for name in names if os.path.isdir(name)]:
        raise DataError(f"{folders[0]} is a folder among {len(names)} sources; give one folder, or image files alone")
    return ImageFiles(names)


class Target(NamedTuple):
    """How the output is stored, and whether it is a folder of parts whatever its size."""

    format: TableFormat
    folder: bool


def target_of(output: str | os.PathLike[str], table_format: TableFormat | None) -> tuple[Target, Path]:
    """What the output's name and the format asked for mean.

    Raises ConfigError when they say nothing or disagree, MissingDependency for a format that nothing here can write.
    """
    if not str(output):
        raise ConfigError("the output has no name; write for example -o features.parquet")
    path = Path(output).expanduser()
    by_suffix = format_of(path)
    kinds = ", ".join(f".{name}" for name in FORMATS)
    if table_format is not None and table_format not in FORMATS:
        raise ConfigError(f"no format is called {table_format!r}; choose one of {', '.join(FORMATS)}")
    if by_suffix is None and table_format is None:
        raise ConfigError(f"the suffix of {path} names no format; end it in one of {kinds}, or add --format")
    if by_suffix is not None and table_format not in (None, by_suffix):
        raise ConfigError(f"{path} ends like {by_suffix}, but --format says {table_format}; leave one out")
    kind = by_suffix or table_format
    assert kind is not None
    if kind == "parquet":
        pyarrow_module()  # its absence would be noticed after hours otherwise
    return Target(kind, folder=by_suffix is None and not path.suffix), path


def check_place(target: Path, images: ImageDataset, *, needs_npy: bool) -> None:
    """Raises ConfigError when nothing can be written there, or what is written would become images."""
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"the output {target} cannot be made, because {parent} is a file; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"nothing can be written to {parent} (Permission denied); choose another output")
    if needs_npy and isinstance(images, Folder) and target.resolve().is_relative_to(Path(images.root).resolve()):
        raise ConfigError(
            f"the output {target} lies in the folder of the images, where its .npy files would be taken for images; "
            "choose a place outside of it"
        )


def wanted_of(loaded: Pretrained, *, registers: bool, mean: bool, patches: bool, layers: Sequence[int]) -> Wanted:
    """What is kept, blocks counted from 0. Raises ConfigError for what the model does not have."""
    if registers and not loaded.num_register_tokens:
        raise ConfigError(f"{loaded.name} has no registers to keep; leave --registers out, or take a model with them")
    blocks = []
    for layer in layers:
        depth = loaded.n_blocks
        if not -depth <= layer < depth:
            raise ConfigError(f"there is no block {layer}; this model has blocks 0 to {depth - 1}")
        blocks.append(layer % depth)
    return Wanted(registers, mean, patches, tuple(dict.fromkeys(blocks)))


def transform_of(loaded: Pretrained, size: int | None, fit: Fit | None, max_tokens: int | None = None) -> EvalTransform:
    """The model's own transform, or the same with another size, fit or largest number of tokens."""
    if size is None and fit is None and max_tokens is None:
        return loaded.transform
    patch = loaded.patch_size
    if size is not None and size % patch:
        near = max(1, round(size / patch)) * patch
        raise ConfigError(f"the size {size} is no multiple of the model's patch of {patch} pixels; write {near}")
    return loaded.transform_with(size=size, fit=fit, max_tokens=max_tokens)


def planned_columns(
    loaded: Pretrained, transform: EvalTransform, wanted: Wanted, *, labelled: bool
) -> tuple[list[str], int]:
    """Names of the columns, patches included, and about how many bytes an image takes in them."""
    names = ["index", "path", "height", "width", *(["label"] if labelled else [])]
    width, grid = loaded.embed_dim, math.prod(loaded.patch_grid(transform.crop_size, transform.crop_size))
    kinds = {"cls": 4 * width}
    if wanted.registers:
        kinds["registers"] = 4 * width * loaded.num_register_tokens
    if wanted.mean:
        kinds["mean"] = 4 * width
    if wanted.patches:
        kinds["patches"] = 2 * width * grid
    prefixes = ["", *(f"layer{layer}_" for layer in wanted.layers)]
    vectors = [f"{prefix}{kind}" for prefix in prefixes for kind in kinds]
    return names + vectors, 64 + len(prefixes) * sum(kinds.values())


def rows_of_a_part(n_images: int, row_bytes: int, batch_size: int) -> int:
    """A multiple of the batch that depends on what is embedded alone: the parts must be the same on any machine."""
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, -(-n_images // _PARTS)), max(1, _MOST_BYTES // row_bytes))
    return max(1, rows // batch_size) * batch_size
