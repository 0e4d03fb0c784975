"""Making parts: decoded batches through the model into tables on disk, one part after the other."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset
from dinov2.encode.embedding import DecodedBatch, Wanted, decoded_batches, embedded
from dinov2.encode.store.parts import PartsFolder, PatchFile
from dinov2.encode.tokens import Tokens
from dinov2.engine.signals import StopRequest
from dinov2.whole_files import escape_name

__all__ = ["EmbedProgress", "PartWork", "Rate"]


class EmbedProgress(NamedTuple):
    """How far all processes together are; with several of them, judged by this one."""

    done: int
    total: int
    images_per_second: float | None
    seconds_to_go: float | None


class Rate:
    """Images per second over the last batches, for the display."""

    def __init__(self, show: Callable[[EmbedProgress], None], done: int, total: int) -> None:
        self._show, self._total, self._kept = show, total, done
        self._own = 0
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=40)

    def add(self, images: int) -> None:
        """That many more images are done."""
        self._own += images
        now, world = time.monotonic(), distributed.get_global_size()
        first, done_then = self._marks[0]
        self._marks.append((now, self._own))
        rate = (self._own - done_then) * world / (now - first) if now > first else None
        done = min(self._total, self._kept + self._own * world)
        if distributed.is_main_process():
            self._show(EmbedProgress(done, self._total, rate, (self._total - done) / rate if rate else None))


@dataclass
class PartWork:
    """What is needed to make parts."""

    folder: PartsFolder
    images: ImageDataset
    encode: Callable[[Tensor, Sequence[int]], Tokens]
    """Tokens of pixels [B, C, H, W] and of the given blocks."""
    transform: Callable[[object], Tensor]
    wanted: Wanted
    parts: Sequence[range]
    """Image numbers of each part."""
    batch_size: int
    threads: int
    channels: int = 3
    pin_memory: bool = False
    notes: Mapping[str, Any] | None = None
    """What travels inside the files."""

    def __post_init__(self) -> None:
        self.targets = self.images.get_targets()

    def run(self, numbers: Sequence[int], stop: StopRequest, rate: Rate, say: Callable[[str], None]) -> None:
        """Make the parts of the given numbers; after a signal no further one is begun."""
        batches = decoded_batches(
            self.images,
            self.transform,
            (batch for number in numbers for batch in self._batches(number)),
            channels=self.channels,
            threads=self.threads,
            pin_memory=self.pin_memory,
        )
        told = False
        with closing(batches):
            for number in numbers:
                if stop:
                    break
                with _Part(self, number) as part:
                    for _ in self._batches(number):
                        batch = next(batches)
                        part.add(batch)
                        rate.add(len(batch.indices) + len(batch.unreadable))
                        if stop and not told:
                            say(f"{stop.reason}: finishing the part at hand; a second Ctrl-C ends at once and loses it")
                            told = True
        if stop:
            self.folder.stop()

    def _batches(self, number: int) -> Iterator[range]:
        part = self.parts[number]
        return (part[first : first + self.batch_size] for first in range(0, len(part), self.batch_size))


class _Part:
    """One part in the making: columns in memory, patch features on their way to the disk."""

    def __init__(self, work: PartWork, number: int) -> None:
        self._work, self._number = work, number
        self._columns: dict[str, list[np.ndarray]] = {}
        self._patches: dict[str, PatchFile] = {}
        self._unreadable: list[tuple[str, str]] = []

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                columns = {name: np.concatenate(pieces) for name, pieces in self._columns.items()}
                self._work.folder.write(
                    self._number,
                    columns or None,
                    unreadable=self._unreadable,
                    patches=self._patches,
                    notes=self._work.notes,
                )
        finally:
            for file in self._patches.values():
                file.discard()  # does nothing to one that has its name

    def add(self, batch: DecodedBatch) -> None:
        work = self._work
        self._unreadable += batch.unreadable
        if not batch.indices:
            return
        sizes = np.array(batch.sizes, dtype=np.int32)
        columns = {
            "index": np.array(batch.indices, dtype=np.int64),
            "path": np.array([_shown(work.images, index) for index in batch.indices], dtype=np.str_),
            "height": sizes[:, 0],
            "width": sizes[:, 1],
        }
        if work.targets is not None:
            columns["label"] = np.asarray(work.targets[batch.indices], dtype=np.int64)
        for name, array in {**columns, **embedded(work.encode, batch, work.wanted)}.items():
            if name.endswith("patches"):
                if name not in self._patches:
                    self._patches[name] = PatchFile(work.folder.patch_file(name, self._number), array.shape[1:])
                self._patches[name].append(array)
            else:
                self._columns.setdefault(name, []).append(array)


def _shown(images: ImageDataset, index: int) -> str:
    """The path of an image, below the root of its data set where it has one, as `escape_name` writes it."""
    path, root = images.path_of(index), getattr(images, "root", None)
    if root is not None and path.startswith(os.path.join(root, "")):
        path = path[len(os.path.join(root, "")) :]
    return escape_name(path)
