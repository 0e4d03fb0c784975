"""The images below a folder, and the files that are passed over, said in one sentence for every kind of data set.

The list of a folder is kept in the user's cache and checked before it is used again.

Names are held as one block of bytes with offsets, because a million Python strings cost ten times as much and, through
their reference counts, a copy in every forked worker. The order is that of the path's components, so that the images
of one class folder lie together and in the order in which torchvision's ImageFolder lists them.

A cached list is trusted while every folder in it has the modification time it had: adding, removing or renaming
anything changes that. Overwriting a file in place does not, so its new size is only seen after a fresh scan. A folder
touched less than two seconds before the scan is not cached at all: a change within the same tick would go unseen.
"""

import hashlib
import json
import logging
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2 import distributed
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.errors import DataError
from dinov2.logging import warn_once
from dinov2.whole_files import atomic_write

__all__ = [
    "PathTable",
    "ending",
    "find_images",
    "name_endings",
    "scan_folder",
    "warn_of_others",
]

logger = logging.getLogger("dinov2")

_CACHE_VERSION = 2
_MOST_ENDINGS = 8  # that a sentence names
_CACHE_FROM = 1000  # images; below that a scan is as fast as reading its cache
_SETTLED_NS = 2_000_000_000


class PathTable:
    """An immutable sequence of strings in two arrays: UTF-8 bytes and offsets. Picklable and cheap to share by fork."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def from_arrays(cls, blob: np.ndarray, ends: np.ndarray) -> "PathTable":
        """The inverse of `arrays`. Raises ValueError when they do not belong together."""
        if len(ends) < 1 or ends[0] != 0 or ends[-1] != len(blob) or (np.diff(ends) < 0).any():
            raise ValueError("offsets and bytes of a path table do not belong together")
        table = cls(())
        table._blob, table._ends = blob, ends
        return table

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes, uint8, and the offsets, int64 `[len + 1]`."""
        return self._blob, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"path {index} was asked of a table of {len(self)}")
        return os.fsdecode(self._blob[self._ends[index] : self._ends[index + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class _FolderScan:
    """The images below a folder.

    `paths` are relative to it with forward slashes, `sizes` their bytes (int64), `folders` every folder visited with
    its modification time in nanoseconds; `hidden` and `other` count the files that are passed over, `other` by ending.
    """

    paths: PathTable
    sizes: np.ndarray
    folders: PathTable
    folder_times: np.ndarray
    hidden: int
    other: dict[str, int]


def find_images(root: str | os.PathLike[str], *, advice: str) -> _FolderScan:
    """The images below `root`, at any depth; a warning counts the other files by their endings.

    Raises DataError, which ends in `advice`, when there is no image.
    """
    scan = scan_folder(root)
    if not len(scan.paths):
        among = f", among them {name_endings(scan.other)}" if scan.other else ""
        counts = f"({sum(scan.other.values())} other and {scan.hidden} hidden files)"
        raise DataError(f"no image was found in {os.path.abspath(root)} {counts}{among}; {advice}")
    warn_of_others(os.path.abspath(root), scan.other)
    return scan


def scan_folder(root: str | os.PathLike[str]) -> _FolderScan:
    """List the images below `root`, at any depth, from the cache when nothing has changed.

    Links to folders are followed (never in a circle); names that begin with a dot and files without an image extension
    are counted and passed over. A scan that takes longer than a second says so on stderr. Raises DataError when `root`
    is missing or no folder.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"the image folder {root} {what}; give the path of a folder that holds images")
    cached = _load_cache(root)
    if cached is not None:
        return cached
    started = time.time_ns()
    scan = _walk(root)
    if len(scan.paths) >= _CACHE_FROM and scan.folder_times.max() < started - _SETTLED_NS:
        _save_cache(root, scan)
    return scan


def warn_of_others(place: str, other: Mapping[str, int], *, fate: str = "passed over") -> None:
    """Log how many files beside the images are passed over, and of which endings; nothing where there are none."""
    if other and distributed.is_main_process():
        count = sum(other.values())
        files = "1 file is" if count == 1 else f"{count:,} files are"
        text = f"{place}: {files} {fate} ({name_endings(other)}), because images end in .jpg, .png, .tif, .webp, ..."
        warn_once(text, text)


def name_endings(other: Mapping[str, int]) -> str:
    """Counts of files by ending, the most frequent first: `9 .heic, 2 .txt`."""
    most = sorted(other.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in most[_MOST_ENDINGS:])
    named = [f"{count:,} {ending}" for ending, count in most[:_MOST_ENDINGS]]
    return ", ".join(named + [f"{rest:,} others"] * bool(rest))


def ending(name: str) -> str:
    """The ending of a file's name for `name_endings`."""
    text = os.path.splitext(name)[1].lower()
    return text if re.fullmatch(r"\.\w{1,8}", text) else "without an ending"


def _cache_file(root: str | os.PathLike[str]) -> Path:
    """File of the list of `root`: below `$DINOV2_CACHE`, or `~/.cache/dinov2`, never in the folder itself."""
    base = os.environ.get("DINOV2_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "dinov2")
    key = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:32]
    return Path(base, "scans", f"{key}.npz")


def _walk(root: str) -> _FolderScan:
    images: list[tuple[str, int]] = []
    folders: list[tuple[str, int]] = []
    hidden = 0
    other: Counter[str] = Counter()
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    with _progress(root) as show:
        while pending:
            relative, above = pending.pop()
            folder = os.path.join(root, relative) if relative else root
            try:
                status = os.stat(folder)
                entries = list(os.scandir(folder))
            except OSError as error:
                if not relative:
                    raise DataError(f"the image folder {root} cannot be listed ({error.strerror or error})") from error
                logger.warning("%s cannot be listed (%s) and is passed over", folder, error.strerror or error)
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                continue  # a link to a folder that contains it
            folders.append((relative, status.st_mtime_ns))
            for entry in entries:
                path = f"{relative}/{entry.name}" if relative else entry.name
                if entry.name.startswith("."):
                    hidden += 1
                elif _is_folder(entry):
                    pending.append((path, above | {identity}))
                elif os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
                    other[ending(entry.name)] += 1
                elif (size := _file_size(entry)) is None:
                    other[f"{ending(entry.name)} that are no regular files"] += 1
                else:
                    images.append((path, size))
            show(len(images))
    images.sort(key=lambda item: item[0].replace("/", "\0"))  # "a/x" before "a-b/x", as the folder names sort
    return _FolderScan(
        paths=PathTable(path for path, _ in images),
        sizes=np.array([size for _, size in images], dtype=np.int64),
        folders=PathTable(path for path, _ in folders),
        folder_times=np.array([when for _, when in folders], dtype=np.int64),
        hidden=hidden,
        other=dict(other),
    )


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file_size(entry: "os.DirEntry[str]") -> int | None:
    try:
        status = entry.stat()
    except OSError:  # a dangling link
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _load_cache(root: str) -> _FolderScan | None:
    try:
        # Opened here and not by numpy, which leaves the file open when it is no archive.
        with open(_cache_file(root), "rb") as file, np.load(file, allow_pickle=False) as cached:
            if int(cached["version"]) != _CACHE_VERSION or os.fsdecode(cached["root"].tobytes()) != root:
                return None
            scan = _FolderScan(
                paths=PathTable.from_arrays(cached["paths"], cached["path_ends"]),
                sizes=cached["sizes"],
                folders=PathTable.from_arrays(cached["folders"], cached["folder_ends"]),
                folder_times=cached["folder_times"],
                hidden=int(cached["hidden"]),
                other=json.loads(cached["other"].tobytes()),
            )
    except Exception:  # missing, half-written by another program, another version: scan again
        return None
    if len(scan.sizes) != len(scan.paths) or len(scan.folder_times) != len(scan.folders):
        return None
    try:
        for relative, when in zip(scan.folders, scan.folder_times.tolist(), strict=True):
            if os.stat(os.path.join(root, relative) if relative else root).st_mtime_ns != when:
                return None
    except OSError:
        return None
    return scan


def _save_cache(root: str, scan: _FolderScan) -> None:
    try:
        with atomic_write(_cache_file(root)) as unfinished, open(unfinished, "wb") as file:
            np.savez(
                file,
                version=np.int64(_CACHE_VERSION),
                root=np.frombuffer(os.fsencode(root), dtype=np.uint8),
                paths=scan.paths.arrays[0],
                path_ends=scan.paths.arrays[1],
                sizes=scan.sizes,
                folders=scan.folders.arrays[0],
                folder_ends=scan.folders.arrays[1],
                folder_times=scan.folder_times,
                hidden=np.int64(scan.hidden),
                other=np.frombuffer(json.dumps(scan.other).encode(), dtype=np.uint8),
            )
    except OSError as error:  # a full or read-only home costs a scan next time, nothing more
        logger.debug("the list of %s is not cached: %s", root, error)


@contextmanager
def _progress(root: str) -> Iterator[Callable[[int], None]]:
    """A function that shows the number of images so far: after a second, a spinner on a terminal or one log line."""
    show_at, status = time.monotonic() + 1.0, None

    def show(count: int) -> None:
        nonlocal show_at, status
        if time.monotonic() < show_at:
            return
        text = f"looking for images in {root}: {count:,} found"
        if not sys.stderr.isatty():
            logger.info("%s so far; the list is kept for next time", text)
            show_at = float("inf")
            return
        if status is None:
            from rich.console import Console
            from rich.status import Status

            status = Status(text, console=Console(stderr=True))
            status.start()
        status.update(text)
        show_at = time.monotonic() + 0.1

    try:
        yield show
    finally:
        if status is not None:
            status.stop()
