"""Files, folders and frames of moving pictures as pictures to look at, one after the other.

Unlike for training and evaluation, photographs are turned upright by their EXIF note: a person will look at them.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dinov2.data.datasets.globbed import images_named
from dinov2.data.decoding import count_frames, decode_rgb
from dinov2.data.image_files import read_image
from dinov2.errors import DataError

__all__ = ["Frame", "find_frames", "open_frame"]

_MAY_MOVE = frozenset(".apng .gif .png .tif .tiff .webp".split())


@dataclass(frozen=True)
class Frame:
    """A picture in a file; `number` counts from 0 in files of several, and is None in others."""

    path: Path
    number: int | None = None

    @property
    def name(self) -> str:
        """The file's name, with the number of the frame if it has one."""
        return self.path.name if self.number is None else f"{self.path.name} {self.number}"


def find_frames(images: Sequence[str | os.PathLike[str]]) -> list[Frame]:
    """All pictures that `images` name: files, folders with everything below, patterns such as `photos/*.jpg`.

    Those of a folder or pattern come in the order people count, in which `frame_10.png` comes after `frame_9.png`.
    Files of several frames (GIF, WebP, TIFF) give each of them. Raises `DataError` for a path that does not exist, a
    pattern without matches, and a folder without images.
    """
    if not images:
        raise DataError("no image was named; give files or a folder")
    paths = (path for source in images for path in sorted(map(Path, images_named(source)), key=_as_counted))
    return [frame for path in paths for frame in _frames_of(path)]


def open_frame(frame: Frame) -> Image.Image:
    """The picture as RGB, upright. Raises `DataError` when it cannot be read."""
    return decode_rgb(read_image(frame.path), path=str(frame.path), exif="apply", frame=frame.number or 0)


def _frames_of(path: Path) -> list[Frame]:
    if path.suffix.lower() not in _MAY_MOVE:
        return [Frame(path)]
    try:
        n_frames = count_frames(read_image(path), path=str(path))
    except DataError:  # raised again when it is opened
        return [Frame(path)]
    return [Frame(path)] if n_frames == 1 else [Frame(path, number) for number in range(n_frames)]


def _as_counted(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.as_posix().lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
