"""Images of a data set through a frozen model: what evaluation, `embed`, `classify` and `neighbours` share.

`decoded_batches` reads images ahead of the model, in threads or worker processes; `encode_batch` runs the model on the
images of each size; `extract_features` collects the rows of all processes in memory. Batches come in the order given,
and which images share one does not depend on threads or workers. Images that cannot be read are left out and listed:
one bad file in a million must not cost the work.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.data.datasets.base import ImageDataset, Subset
from dinov2.data.datasets.imagenet_classes import infer_class_ids
from dinov2.encode.tokens import Tokens
from dinov2.errors import ConfigError, DataError

__all__ = [
    "DecodedBatch",
    "EmbeddingSpec",
    "Features",
    "Scoring",
    "decoded_batches",
    "encode_batch",
    "evaluating",
    "extract_features",
    "read_ahead",
]

_NO_LABEL = -1
_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


class _LabelledImages(Sized, Protocol):
    """A length, and `(image, target)` by index; the image is a tensor [C, H, W] unless a transform makes it one."""

    def __getitem__(self, index: int, /) -> tuple[object, int | None]: ...


@dataclass(frozen=True)
class Scoring:
    """The rules of a test set; classes are counted as its labels count them."""

    own_classes: bool = False
    """Whether answers are chosen among the set's own classes alone."""
    class_mapping: Tensor | None = None
    """int64 [C_test]: the training label of each, where neither identifiers nor names shall tell; implies the above."""
    label_sets: Tensor | None = None
    """int64 [S, A], padded with -1: all labels of an image that are right; one without any is in no such figure."""
    parts: tuple[tuple[str, int], ...] = ()
    """(corruption, severity) of each part."""
    part_numbers: Tensor | None = None
    """int64 [S]: the part that an image belongs to."""

    @classmethod
    def of(cls, dataset: Any, images: Tensor) -> "Scoring | None":
        """The rules of a data set for the images at these positions (int64 [S]); None for the usual ones."""
        if isinstance(dataset, Subset):
            return cls.of(dataset.dataset, torch.from_numpy(dataset.rows)[images])
        own_classes = getattr(dataset, "class_mapping", None) is not None
        label_sets, part_numbers = (_rows(dataset, name, images) for name in ("label_sets", "part_numbers"))
        if not own_classes and label_sets is None and part_numbers is None:
            return None
        parts = tuple((str(name), int(severity)) for name, severity in getattr(dataset, "parts", ()))
        return cls(own_classes, label_sets=label_sets, parts=parts, part_numbers=part_numbers)

    def take(self, rows: Tensor) -> "Scoring":
        """The rules for the given rows (int64 [R])."""
        label_sets, part_numbers = (None if x is None else x[rows] for x in (self.label_sets, self.part_numbers))
        return replace(self, label_sets=label_sets, part_numbers=part_numbers)


def _rows(dataset: Any, name: str, images: Tensor) -> Tensor | None:
    values = getattr(dataset, name, None)
    return None if values is None else torch.as_tensor(np.asarray(values), dtype=torch.int64)[images]


@dataclass(frozen=True)
class Features:
    """Features of the readable images of a data set, on the CPU, in the order of the data set."""

    features: Tensor
    """float32 [S, D]."""
    labels: Tensor | None = None
    """int64 [S], -1 where an image has no label; None when no image has one."""
    class_names: tuple[str, ...] | None = None
    """Name of class 0, 1, ... where the data set knows them."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """(path, reason) of every image that was left out."""
    indices: Tensor | None = None
    """int64 [S]: position of each row's image in the data set; None means 0, 1, 2, ..."""
    class_ids: tuple[str, ...] | None = None
    """Identifier of class 0, 1, ... (WordNet's of ImageNet's classes), which counts before a name does."""
    scoring: Scoring | None = None
    """Scoring of answers for these images, where it is not one label each among all classes."""

    def __len__(self) -> int:
        return self.features.shape[0]

    def take(self, rows: Tensor) -> "Features":
        """The same features for the given rows (int64 [R]) only, in that order."""
        return replace(
            self,
            features=self.features[rows],
            labels=None if self.labels is None else self.labels[rows],
            indices=rows if self.indices is None else self.indices[rows],
            scoring=None if self.scoring is None else self.scoring.take(rows),
        )


@dataclass(frozen=True)
class EmbeddingSpec:
    """Parts of an image's tokens that are kept besides the class token."""

    registers: bool = False
    mean: bool = False
    """The mean over its patch tokens."""
    patches: bool = False
    layers: tuple[int, ...] = ()
    """Blocks, counted from 0, of which the same is kept."""

    def columns(self, tokens: Tokens) -> dict[str, Tensor]:
        """`cls` [B, D], `registers` [B, R, D], `mean` [B, D], `patches` [B, h, w, D]; `layer<i>_cls` of a block."""
        columns: dict[str, Tensor] = {}
        for prefix, block in [("", tokens), *((f"layer{layer}_", tokens.layers[layer]) for layer in self.layers)]:
            columns[f"{prefix}cls"] = block.cls
            if self.registers:
                columns[f"{prefix}registers"] = block.registers
            if self.mean:
                columns[f"{prefix}mean"] = block.patches.mean(dim=(1, 2))
            if self.patches:
                columns[f"{prefix}patches"] = block.patches
        return columns


class DecodedBatch(NamedTuple):
    """The readable images of one batch, in order."""

    indices: list[int]
    """Positions in the data set."""
    targets: list[int]
    """-1 for an image without a label."""
    sizes: list[tuple[int, int]]
    """Height and width of each image as it is stored, upright."""
    groups: list[tuple[list[int], Tensor]]
    """Rows of this batch that have one size, and their pixels [n, C, H, W] as the model takes them."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of the images left out."""


def read_ahead(
    read: Callable[[_Item], _Read], items: Iterable[_Item], *, threads: int = 1
) -> Generator[_Read, None, None]:
    """`read` of each item, in order, in threads ahead of use; at most `threads + 1` results wait in memory.

    Pillow releases the interpreter while it decodes and resizes, so one thread beside the model is enough on a laptop.
    With 0 threads an item is read when it is asked for.
    """
    if not threads:
        yield from map(read, items)
        return
    waiting: deque[Future[_Read]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def decoded_batches(
    dataset: _LabelledImages | ImageDataset,
    batches: Iterable[range],
    *,
    transform: Callable[[object], Tensor] | None = None,
    channels: int = 3,
    threads: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[DecodedBatch, None, None]:
    """Decode `batches` of image numbers ahead of use, in `workers` processes, or where there are none in `threads`.

    An `ImageDataset` needs the `transform` from an image, or from its tensor where `channels` are not 3, to the
    model's input. Raises `DataError` for a data set that gives no floating-point tensors.
    """
    reader = _BatchReader(dataset, transform, channels, pin_memory and not workers)
    if not workers:
        yield from read_ahead(reader.__getitem__, batches, threads=threads)
        return
    yield from DataLoader(
        reader,
        batch_size=None,
        sampler=list(batches),
        num_workers=min(workers, os.cpu_count() or 1),  # more only slow each other down
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        # A loader draws a seed for its workers; from the global generator that would change the training around it.
        generator=torch.Generator().manual_seed(0),
    )


def encode_batch(encode: Callable[[Tensor], Mapping[str, Tensor]], batch: DecodedBatch) -> dict[str, Tensor]:
    """Columns [B, ...] by name of a batch that is not empty: `encode` maps pixels [n, C, H, W] of one size to columns.

    Raises `DataError` for columns whose shape depends on the size of an image where sizes differ.
    """
    groups = [encode(pixels) for _, pixels in batch.groups]
    if len(groups) == 1:
        return dict(groups[0])
    if any(group[name].shape[1:] != column.shape[1:] for group in groups for name, column in groups[0].items()):
        raise DataError(
            "patch features need images of one size, and these differ after the transform; use --fit crop, or leave "
            "--patches out"
        )
    order = torch.tensor([row for rows, _ in batch.groups for row in rows]).argsort()
    return {name: torch.cat([group[name] for group in groups])[order.to(groups[0][name].device)] for name in groups[0]}


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Evaluation mode inside the block; every sub-module's own training flag is restored after it."""
    flags = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    for module in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def extract_features(
    model: Callable[[Tensor], Tensor],
    dataset: _LabelledImages | ImageDataset,
    *,
    transform: Callable[[object], Tensor] | None = None,
    channels: int = 3,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run `model` over `dataset` in index order and keep what it returns, float32 on the CPU.

    Args:
        model: any callable from images [B, C, H, W] on `device` to features [B, D]. Modules run in evaluation mode and
            get their training flags back.
        dataset: gives `(image, target or None)`; a `DataError` or `OSError` skips the image.
        transform, channels: for an `ImageDataset`, as in `decoded_batches`; other data sets give tensors.
        autocast_dtype: bfloat16 or float16 to run the model under autocast; None or float32 runs it as it is.
        progress: called with (images done, images in all) of this process after every batch.

    Over several processes all of them must call this with the same arguments; each takes a contiguous range, without
    padding, and gets all rows.

    Raises:
        DataError: the data set is empty, or not one of its images could be read.
        ConfigError: the model does not return [B, D].
    """
    device = torch.device(device)
    n_images, rank, world_size = len(dataset), distributed.get_global_rank(), distributed.get_global_size()
    if n_images == 0:
        raise DataError("the data set holds no images, so there is nothing to extract features from")
    first, last = n_images * rank // world_size, n_images * (rank + 1) // world_size
    use_autocast = autocast_dtype not in (None, torch.float32)

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(), torch.autocast(device.type, dtype=autocast_dtype, enabled=use_autocast):
            output: object = model(pixels.to(device, non_blocking=True))
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != len(pixels):
            got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"features need a model that returns [B, D] for {len(pixels)} images, this one returned {got}; "
                "wrap it in a function that picks the class token"
            )
        return {"features": output.float()}

    # Allocated at the first batch and outside inference mode: classifiers must be able to train on these features.
    rows: Tensor | None = None
    labels: list[int] = []
    indices: list[int] = []
    failures: list[tuple[str, str]] = []
    batches = (range(start, min(start + batch_size, last)) for start in range(first, last, batch_size))
    decoded = decoded_batches(
        dataset,
        batches,
        transform=transform,
        channels=channels,
        threads=0,
        workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    with evaluating(model):
        for batch in decoded:
            failures += batch.unreadable
            if batch.indices:
                output = encode_batch(encode, batch)["features"]
                if rows is None:
                    rows = torch.empty(last - first, output.shape[1])
                rows[len(indices) : len(indices) + len(output)] = output.cpu()
                labels += batch.targets
                indices += batch.indices
            if progress is not None:
                progress(len(indices) + len(failures), last - first)

    if rows is None:  # nothing was readable here; the other processes know how wide a row is
        rows = torch.empty(0, 0)
    width = int(distributed.all_reduce_max(torch.tensor([rows.shape[1]])))
    own = (
        rows[: len(indices)].reshape(len(indices), width),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(indices, dtype=torch.int64),
    )
    all_rows, all_labels, all_indices = (distributed.all_gather_rows(local) for local in own)
    all_failures = _gather_failures(failures)
    if not len(all_indices):
        path, reason = all_failures[0]
        raise DataError(f"none of the {n_images} images could be read; the first is {path}: {reason}")
    class_names, class_ids = getattr(dataset, "class_names", None), infer_class_ids(dataset)
    return Features(
        features=all_rows,
        labels=all_labels if bool((all_labels != _NO_LABEL).any()) else None,
        class_names=None if class_names is None else tuple(class_names),
        unreadable=tuple(all_failures),
        indices=all_indices,
        class_ids=None if class_ids is None else tuple(class_ids),
        scoring=Scoring.of(dataset, all_indices),
    )


class _BatchReader(Dataset[DecodedBatch]):
    """Batches of a data set by the numbers of their images."""

    def __init__(
        self,
        dataset: _LabelledImages | ImageDataset,
        transform: Callable[[object], Tensor] | None,
        channels: int,
        pin_memory: bool,
    ) -> None:
        self.dataset, self.transform, self.channels, self.pin_memory = dataset, transform, channels, pin_memory

    def __getitem__(self, numbers: range) -> DecodedBatch:
        batch, images = DecodedBatch([], [], [], [], []), list[Tensor]()
        for index in numbers:
            try:
                image, target, size = self._read(index)
            except (DataError, OSError) as error:
                path_of = getattr(self.dataset, "path_of", None)
                path = str(path_of(index)) if path_of is not None else f"image {index}"
                batch.unreadable.append((path, str(error) or type(error).__name__))
                continue
            if not isinstance(image, Tensor) or not image.is_floating_point():
                got = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
                raise DataError(f"image {index} of the data set is {got}; give a transform to normalised float tensors")
            images.append(image)
            batch.indices.append(index)
            batch.targets.append(_NO_LABEL if target is None else int(target))
            batch.sizes.append(size)
        rows_of: dict[torch.Size, list[int]] = {}
        for row, image in enumerate(images):
            rows_of.setdefault(image.shape, []).append(row)
        for rows in rows_of.values():
            pixels = torch.stack([images[row] for row in rows])
            batch.groups.append((rows, pixels.pin_memory() if self.pin_memory else pixels))
        return batch

    def _read(self, index: int) -> tuple[object, int | None, tuple[int, int]]:
        dataset = self.dataset
        if self.transform is None or not isinstance(dataset, ImageDataset):
            image, target = dataset[index]
            size = (int(image.shape[-2]), int(image.shape[-1])) if isinstance(image, Tensor) else (0, 0)
            return image, target, size
        if self.channels == 3:
            picture = dataset.get_image(index)
            return self.transform(picture), dataset.get_target(index), (picture.height, picture.width)
        pixels = dataset.get_tensor(index, channels=self.channels)
        return self.transform(pixels), dataset.get_target(index), (pixels.shape[1], pixels.shape[2])


def _as_it_is(batch: Any) -> Any:
    return batch


def _gather_failures(failures: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The failures of all processes in rank order: JSON lines, sent as the rows of a byte tensor."""
    text = "".join(json.dumps(failure) + "\n" for failure in failures).encode()
    local = torch.tensor(list(text), dtype=torch.uint8)
    everyone = bytes(distributed.all_gather_rows(local).tolist()).decode()
    return [(path, reason) for path, reason in map(json.loads, everyone.splitlines())]
