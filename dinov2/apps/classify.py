"""Names and probabilities of images by a linear classifier: a released one, or a head file on any backbone.

Images are decoded by threads ahead of the model, and each prediction is handed on as soon as it is known. An image that
cannot be read is a prediction with a reason instead of classes, and stops nothing.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from dinov2.checkpoints.files import read_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.locate import ShowProgress
from dinov2.data.datasets.files import ImageFiles, find_image_files
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES, ImageNetClass
from dinov2.encode.stream import DecodedBatch, decoded_batches, encode_batch
from dinov2.errors import ConfigError, DataError, DinoError, WeightsError
from dinov2.models.heads import LinearHead
from dinov2.models.releases import RELEASES
from dinov2.pretrained import Pretrained, digest_of_files, load
from dinov2.whole_files import write_text

__all__ = ["Classification", "Guess", "Prediction", "classify", "find_classified_images", "write_classification"]


class Guess(NamedTuple):
    """A class that an image may show."""

    number: int
    """Number of the class, from 0."""
    wnid: str
    """Identifier in ImageNet; "" for classes of other data sets."""
    name: str
    probability: float
    """Softmax over all classes of the head."""


class Prediction(NamedTuple):
    """Prediction for one image."""

    path: str
    top: tuple[Guess, ...] = ()
    """The likeliest classes, best first; empty for an image that could not be classified."""
    error: str | None = None
    """Reason why there are none."""


@dataclass(frozen=True)
class Classification:
    """All predictions in the order of the images, and with what they were made."""

    predictions: list[Prediction]
    made_with: dict[str, object]
    """Model, head, transform and precision as plain values."""

    @property
    def failures(self) -> list[Prediction]:
        """Images that could not be classified."""
        return [prediction for prediction in self.predictions if prediction.error is not None]


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
        sources: what `find_classified_images` understands.
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
    paths = find_classified_images(sources)
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


def find_classified_images(sources: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Paths of the images that files, folders (at any depth) and glob patterns stand for, each once.

    An existing path always wins over a pattern. Raises `DataError` for a source without images.
    """
    found: dict[str, str] = {}
    for path in (path for source in sources for path in find_image_files(source)):
        found.setdefault(os.path.abspath(path), path)
    if not found:
        raise DataError("no image was named; give files, folders or patterns")
    return list(found.values())


def write_classification(result: Classification, target: TextIO | Path) -> None:
    """Writes everything as one JSON document; a file is replaced as a whole. Raises `DinoError` when it cannot be."""
    images = [
        {"path": prediction.path, "error": prediction.error}
        if prediction.error is not None
        else {"path": prediction.path, "top": [_as_json(guess) for guess in prediction.top]}
        for prediction in result.predictions
    ]
    text = json.dumps({**result.made_with, "images": images}, indent=1) + "\n"
    if not isinstance(target, Path):
        target.write(text)
        return
    try:
        write_text(target, text)
    except OSError as error:
        raise DinoError(f"{target} could not be written ({error.strerror}); choose another place for --json") from error


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
    images, threads = ImageFiles(paths), min(4, os.cpu_count() or 1)
    size = min(batch_size, -(-len(paths) // threads))  # a few images are decoded side by side too
    batches = [range(first, min(first + size, len(paths))) for first in range(0, len(paths), size)]
    decoded = decoded_batches(images, batches, transform=model.transform, channels=model.in_chans, threads=threads)
    for numbers, batch in zip(batches, decoded, strict=True):
        failures = iter(batch.unreadable)
        answers = dict(zip(batch.indices, _likeliest(model, batch, top), strict=True))
        for number in numbers:
            path, answer = paths[number], answers.get(number)
            if answer is None:
                yield Prediction(path, error=next(failures)[1])
            elif isinstance(answer, DataError):
                yield Prediction(path, error=f"{path}: {answer}")
            else:
                yield Prediction(path, tuple(Guess(index, *names[index], share) for index, share in answer))


def _likeliest(model: Pretrained, batch: DecodedBatch, top: int) -> "list[list[tuple[int, float]] | DataError]":
    """The likeliest classes of each image and their probabilities, best first, or why there are none.

    One overflow must not cost the other images their classes.
    """
    if not batch.indices:
        return []
    try:
        logits = encode_batch(lambda pixels: {"logits": model.classify(pixels)}, batch)["logits"]  # [B, C]
    except DataError as error:
        if len(batch.indices) == 1:
            return [error]
        rows = {row: image for rows, pixels in batch.groups for row, image in zip(rows, pixels, strict=True)}
        alone = (batch._replace(indices=[row], groups=[([0], rows[row][None])]) for row in sorted(rows))
        return [answer for one in alone for answer in _likeliest(model, one, top)]
    shares, indices = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]), dim=-1)
    pairs = zip(indices.tolist(), shares.tolist(), strict=True)
    return [list(zip(row, values, strict=True)) for row, values in pairs]


def _described(loaded: Pretrained, head: LinearHead, file: str | os.PathLike[str] | None) -> dict[str, object]:
    described: dict[str, object] = {"layers": head.layers, "classes": head.out_features}
    if file is not None:
        described |= {"source": str(file), "sha256": digest_of_files([Path(file).expanduser()])}
    return {
        "model": {"name": loaded.name, "source": loaded.source, "sha256": loaded.digest},
        "head": described,
        "transform": loaded.transform.describe(),
        "precision": str(loaded.autocast_dtype or torch.float32).removeprefix("torch."),
    }


def _as_json(guess: Guess) -> dict[str, object]:
    identifier = {"wnid": guess.wnid} if guess.wnid else {}
    return {"class": guess.number, **identifier, "name": guess.name, "probability": guess.probability}
