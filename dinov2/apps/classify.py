"""Names and probabilities of images by a linear classifier: a released one, or a head file on any backbone.

Images are decoded by threads ahead of the model, and each prediction is handed on as soon as it is known. An image that
cannot be read is a prediction with a reason instead of classes, and stops nothing.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.apps.predictions import Classification, Guess, Prediction
from dinov2.checkpoints.files import read_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.locate import ShowProgress
from dinov2.data.datasets.files import find_image_files
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES, ImageNetClass
from dinov2.encode.image_inputs import to_model_input
from dinov2.errors import ConfigError, DataError, WeightsError
from dinov2.models.heads import LinearHead
from dinov2.models.releases import RELEASES
from dinov2.pretrained import Pretrained, digest_of_files, load

__all__ = ["classify", "find_images"]


def classify(
    sources: Sequence[str | os.PathLike[str]],
    *,
    model: str | os.PathLike[str] = "dinov2_vits14_lc",
    layers: int | None = None,
    head: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | None = None,
    top: int = 5,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
    each: Callable[[Prediction], None] = lambda prediction: None,
    progress: ShowProgress = lambda label: None,
) -> Classification:
    """Classifies images, folders of images and glob patterns, in this order; `each` gets a prediction once it is known.

    Args:
        sources: what `find_images` understands.
        model: a classifier (`dinov2_vits14_lc`, a Hugging Face folder with a classifier), or any backbone when `head`
            is given.
        layers: blocks that the head reads, 1 or 4; None takes 4 for a release and what a file's width tells.
        head: a file with `weight` `[C, (1+layers)*D]` and `bias` `[C]`.
        classes: a text file with the name of one class a line; without it 1,000 classes are those of ImageNet.
        top: how many classes are kept of each image.

    Raises:
        DataError: a source holds no image.
        WeightsError: the head does not fit the backbone, or there is none.
        ConfigError: the names are not as many as the classes, or a number is out of range.
    """
    for what, value in {"number of classes to show": top, "batch": batch_size}.items():
        if value < 1:
            raise ConfigError(f"the {what} is {value}; write 1 or more")
    if layers not in (None, 1, 4):
        raise ConfigError(f"a linear classifier reads 1 or 4 layers, not {layers}")
    # What can be wrong here is looked at before a model is fetched.
    paths = find_images(sources)
    own_names = None if classes is None else _read_names(classes)
    loaded = _with_head(model, layers=layers, head=head, device=device, precision=precision, progress=progress)
    assert loaded.head is not None
    names = _names_for(loaded.head.out_features, own_names, str(classes))
    show = progress("classifying")
    predictions: list[Prediction] = []
    for prediction in _predictions(paths, loaded, names, top=top, batch_size=batch_size):
        predictions.append(prediction)
        each(prediction)
        if show is not None:
            show(len(predictions), len(paths))
    return Classification(predictions, _described(loaded, loaded.head, head))


def find_images(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Paths of the images that files, folders (at any depth) and glob patterns stand for, each once.

    An existing path always wins over a pattern. Raises `DataError` for a source without images.
    """
    found: dict[str, str] = {}
    for path in (path for source in sources for path in find_image_files(source)):
        found.setdefault(os.path.abspath(path), path)
    if not found:
        raise DataError("no image was named; give files, folders or patterns")
    return list(found.values())


def _read_names(file: str | os.PathLike[str]) -> list[str]:
    try:
        path = Path(file).expanduser()
        if path.exists() and not path.is_file():  # a pipe would wait for a writer
            raise ConfigError(f"the class names {file} are no regular file; give a text file with one name a line")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(
            f"the class names {file} cannot be read ({reason}); give a text file with one name a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _names_for(count: int, own: list[str] | None, file: str) -> Sequence[ImageNetClass]:
    """Identifier and name of each class of the head."""
    if own is not None:
        if len(own) != count:
            raise ConfigError(f"{file} names {len(own)} classes, but the head has {count}; write one name a line")
        return [ImageNetClass("", name) for name in own]
    if count == len(IMAGENET_CLASSES):
        return IMAGENET_CLASSES
    return [ImageNetClass("", f"class {index}") for index in range(count)]


def _with_head(
    source: str | os.PathLike[str],
    *,
    layers: int | None,
    head: str | os.PathLike[str] | None,
    device: str,
    precision: str,
    progress: ShowProgress,
) -> Pretrained:
    """The model with the classifier that was asked for; a head file is read before a backbone is fetched."""
    name = str(source)
    content = None if head is None else read_file(Path(head).expanduser())
    backbones = {row.name for row in RELEASES if row.kind == "backbone"}
    if head is None and name in backbones and not Path(source).expanduser().exists():
        raise WeightsError(f"{name} is a backbone without a classifier; write {name}_lc, or give --head FILE")
    loaded = load(source, device=device, precision=precision, layers=layers or 4, progress=progress)
    if content is not None:
        loaded.head = head_from_state(content, embed_dim=loaded.embed_dim, layers=layers, source=str(head))
        loaded.head.to(loaded.device)
    if loaded.head is None:
        raise WeightsError(f"{loaded.source} holds a backbone without a classifier; give one with --head FILE")
    if layers not in (None, loaded.head.layers):
        raise WeightsError(
            f"the classifier of {loaded.source} reads {loaded.head.layers} layers, not {layers}; leave --layers out"
        )
    depth = loaded.table.get("depth")
    if depth and loaded.head.layers > depth:
        raise WeightsError(
            f"the head reads {loaded.head.layers} layers, but {loaded.name} has {depth}; give a 1-layer head"
        )
    return loaded


def _predictions(
    paths: Sequence[str], model: Pretrained, names: Sequence[ImageNetClass], *, top: int, batch_size: int
) -> Iterator[Prediction]:
    batch: list[tuple[str, Tensor | str]] = []
    for number, decoded in enumerate(_decoded(paths, model, ahead=2 * batch_size), start=1):
        batch.append(decoded)
        if len(batch) == batch_size or number == len(paths):
            yield from _classified(batch, model, names, top)
            batch = []


def _decoded(paths: Sequence[str], model: Pretrained, *, ahead: int) -> Iterator[tuple[str, Tensor | str]]:
    """Each path with its image, or with the reason why there is none; at most `ahead` images wait in memory."""

    def read(path: str) -> Tensor | str:
        try:
            channels = model.in_chans
            return to_model_input(path, model.transform, patch_size=model.patch_size, channels=channels)
        except (DataError, OSError) as error:
            return str(error)

    waiting: deque[tuple[str, Future[Tensor | str]]] = deque()
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        try:
            for path in paths:
                if len(waiting) == ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
                waiting.append((path, pool.submit(read, path)))
            for first, future in waiting:
                yield first, future.result()
        finally:  # after an error or Ctrl-C nobody waits for images that nobody will look at
            pool.shutdown(wait=False, cancel_futures=True)


def _classified(
    batch: Sequence[tuple[str, Tensor | str]], model: Pretrained, names: Sequence[ImageNetClass], top: int
) -> Iterator[Prediction]:
    images = [image for _, image in batch if isinstance(image, Tensor)]
    rows = iter(_answers(images, model, top))
    for path, image in batch:
        if isinstance(image, str):
            yield Prediction(path, error=image)
            continue
        best = next(rows)
        if isinstance(best, DataError):
            yield Prediction(path, error=f"{path}: {best}")
            continue
        yield Prediction(path, tuple(Guess(index, *names[index], probability) for index, probability in best))


def _answers(images: Sequence[Tensor], model: Pretrained, top: int) -> "list[list[tuple[int, float]] | DataError]":
    """For each image its likeliest classes, or why there are none: one overflow must not cost the others theirs."""
    try:
        return [*_best(model.classify(torch.stack(list(images))), top)] if images else []
    except DataError as error:
        return [error] if len(images) == 1 else [answer for image in images for answer in _answers([image], model, top)]


def _best(logits: Tensor, top: int) -> list[list[tuple[int, float]]]:  # [B, C]
    """Class numbers and probabilities of the likeliest classes, best first."""
    found = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [list(zip(indices, values, strict=True)) for indices, values in rows]


def _described(loaded: Pretrained, head: LinearHead, file: str | os.PathLike[str] | None) -> dict[str, Any]:
    described: dict[str, Any] = {"layers": head.layers, "classes": head.out_features}
    if file is not None:
        described |= {"source": str(file), "sha256": digest_of_files([Path(file).expanduser()])}
    return {
        "model": {"name": loaded.name, "source": loaded.source, "sha256": loaded.digest},
        "head": described,
        "transform": loaded.transform.describe(),
        "precision": str(loaded.autocast_dtype or torch.float32).removeprefix("torch."),
    }
