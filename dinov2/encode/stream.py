"""From a model and a data set to a matrix of features, on one process or several.

Every process takes its own contiguous range of the data set, without padding, so no image is counted twice and the rows
that are gathered in rank order are already in the order of the data set. Images that cannot be read are left out and
listed: one bad file in a million must not cost the evaluation. `Features.indices` says which image each row is.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as l2_normalize
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.data.datasets.imagenet_classes import infer_class_ids
from dinov2.encode.scoring import Scoring
from dinov2.errors import ConfigError, DataError

__all__ = ["Features", "LabelledImages", "evaluating", "extract_features"]

_NO_LABEL = -1


class LabelledImages(Sized, Protocol):
    """What is needed of a data set: a length, and `(image tensor [C, H, W], target)` by index."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


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
    """Identifier of class 0, 1, ... (WordNet's of ImageNet's classes), which tells before a name does."""
    scoring: Scoring | None = None
    """How answers for these images are scored, where not by one label each among all classes."""

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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
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
    dataset: LabelledImages,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    autocast_dtype: torch.dtype | None = None,
    normalize: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run `model` over `dataset` in index order and keep what it returns, float32 on the CPU.

    Args:
        model: any callable from images [B, C, H, W] on `device` to features [B, D]. Modules run in evaluation mode and
            get their training flags back.
        dataset: gives `(image tensor [C, H, W], target or None)`; a `DataError` or `OSError` skips the image.
        autocast_dtype: bfloat16 or float16 to run the model under autocast; None or float32 runs it as it is.
        normalize: divide every row by its L2 norm.
        transform: from a uint8 batch [B, C, H, W] on `device` to what the model takes; needed when the data set gives
            uint8 images, called image by image when their sizes differ.
        progress: called with (images done, images in all) of this process after every batch.

    Over several processes all of them must call this with the same arguments; each gets all rows.

    Raises:
        DataError: the data set is empty, or not one of its images could be read.
        ConfigError: the model does not return [B, D].
    """
    device = torch.device(device)
    n_images, rank, world_size = len(dataset), distributed.get_global_rank(), distributed.get_global_size()
    if n_images == 0:
        raise DataError("the data set holds no images, so there is nothing to extract features from")
    first, last = n_images * rank // world_size, n_images * (rank + 1) // world_size
    loader = DataLoader(
        _ReadableOnly(dataset, first, last),
        batch_size=batch_size,
        num_workers=min(num_workers, os.cpu_count() or 1),  # more only slow each other down
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        # A loader draws a seed for its workers; from the global generator that would change the training around it.
        generator=torch.Generator().manual_seed(0),
    )

    # Allocated at the first batch and outside inference mode: classifiers must be able to train on these features.
    rows: Tensor | None = None
    labels = torch.full((last - first,), _NO_LABEL, dtype=torch.int64)
    indices = torch.zeros(last - first, dtype=torch.int64)
    failures: list[tuple[str, str]] = []
    filled, done = 0, 0
    with evaluating(model):
        for batch in loader:
            failures.extend(batch.failures)
            done += len(batch.indices) + len(batch.failures)
            if batch.indices:
                output = _run(model, batch.images, device, autocast_dtype, transform, normalize)
                if rows is None:
                    rows = torch.empty(last - first, output.shape[1])
                upto = filled + len(batch.indices)
                rows[filled:upto] = output.cpu()
                labels[filled:upto] = torch.tensor(batch.labels)
                indices[filled:upto] = torch.tensor(batch.indices)
                filled = upto
            if progress is not None:
                progress(done, last - first)

    if rows is None:  # nothing was readable here; the other processes know how wide a row is
        rows = torch.empty(0, 0)
    width = int(distributed.all_reduce_max(torch.tensor([rows.shape[1]])))
    rows, labels, indices = (
        distributed.all_gather_rows(local)
        for local in (rows[:filled].reshape(filled, width), labels[:filled], indices[:filled])
    )
    all_failures = _gather_failures(failures)
    if not len(indices):
        path, reason = all_failures[0]
        raise DataError(f"none of the {n_images} images could be read; the first is {path}: {reason}")
    class_names, class_ids = getattr(dataset, "class_names", None), infer_class_ids(dataset)
    return Features(
        features=rows,
        labels=labels if bool((labels != _NO_LABEL).any()) else None,
        class_names=None if class_names is None else tuple(class_names),
        unreadable=tuple(all_failures),
        indices=indices,
        class_ids=None if class_ids is None else tuple(class_ids),
        scoring=Scoring.of(dataset, indices),
    )


def _run(
    model: Callable[[Tensor], Tensor],
    images: list[Tensor],
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    transform: Callable[[Tensor], Tensor] | None,
    normalize: bool,
) -> Tensor:
    """Features float32 [B, D] of a list of images [C, H, W]."""
    use_autocast = autocast_dtype not in (None, torch.float32)
    with torch.inference_mode(), torch.autocast(device.type, dtype=autocast_dtype, enabled=use_autocast):
        output = model(_to_batch(images, device, transform))
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != len(images):
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"features need a model that returns [B, D] for {len(images)} images, this one returned {got}; "
            "wrap it in a function that picks the class token"
        )
    output = output.float()
    return l2_normalize(output, dim=1) if normalize else output


def _to_batch(
    images: list[Tensor], device: torch.device, transform: Callable[[Tensor], Tensor] | None
) -> Tensor:  # [B, C, H, W]
    if images[0].dtype == torch.uint8:
        if transform is None:
            raise DataError(
                "the data set gives uint8 images, which no model takes; give `transform`, "
                "or make the data set convert and normalise its images"
            )
        if all(image.shape == images[0].shape for image in images):
            return transform(torch.stack(images).to(device, non_blocking=True))
        return torch.cat([transform(image.unsqueeze(0).to(device, non_blocking=True)) for image in images])
    if any(image.shape != images[0].shape for image in images):
        sizes = ", ".join(sorted({str(list(image.shape)) for image in images})[:3])
        raise DataError(f"images of one batch have different sizes ({sizes}); resize and crop them alike")
    return torch.stack(images).to(device, non_blocking=True)


class _Batch(NamedTuple):
    images: list[Tensor]
    labels: list[int]
    indices: list[int]
    failures: list[tuple[str, str]]


class _Sample(NamedTuple):
    number: int
    image: Tensor | None
    label: int
    failure: tuple[str, str] | None


class _ReadableOnly(Dataset[_Sample]):
    """Images `first` to `last` of a data set, where an unreadable one is a record of its failure."""

    def __init__(self, dataset: LabelledImages, first: int, last: int) -> None:
        self.dataset, self.first, self.last = dataset, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, position: int) -> _Sample:
        index = self.first + position
        try:
            image, target = self.dataset[index]
        except (DataError, OSError) as error:
            path_of = getattr(self.dataset, "path_of", None)
            path = str(path_of(index)) if path_of is not None else f"image {index}"
            return _Sample(index, None, _NO_LABEL, (path, str(error) or type(error).__name__))
        if not isinstance(image, Tensor):
            raise DataError(
                f"image {index} of the data set is a {type(image).__name__}, not a tensor; "
                "give the data set a transform that ends in one"
            )
        return _Sample(index, image, _NO_LABEL if target is None else int(target), None)


def _collate(samples: Sequence[_Sample]) -> _Batch:
    readable = [(s.image, s.label, s.number) for s in samples if s.image is not None]
    return _Batch(
        images=[image for image, _, _ in readable],
        labels=[label for _, label, _ in readable],
        indices=[index for _, _, index in readable],
        failures=[s.failure for s in samples if s.failure is not None],
    )


def _gather_failures(failures: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The failures of all processes in rank order: JSON lines, sent as the rows of a byte tensor."""
    text = "".join(json.dumps(failure) + "\n" for failure in failures).encode()
    local = torch.tensor(list(text), dtype=torch.uint8)
    everyone = bytes(distributed.all_gather_rows(local).tolist()).decode()
    return [(path, reason) for path, reason in map(json.loads, everyone.splitlines())]
