"""What a classifier says about images, and how it is written down: CSV as it comes, JSON as a whole."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dinov2.errors import DinoError
from dinov2.whole_files import write_text

__all__ = ["Classification", "CsvPredictions", "Guess", "Prediction", "write_json"]


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
    """What the classifier says about one image."""

    path: str
    top: tuple[Guess, ...] = ()
    """The likeliest classes, best first; empty for an image that could not be classified."""
    error: str | None = None
    """Why there are none."""


@dataclass(frozen=True)
class Classification:
    """All predictions in the order of the images, and with what they were made."""

    predictions: list[Prediction]
    made_with: dict[str, Any]
    """Model, head, transform and precision as plain values."""

    @property
    def failures(self) -> list[Prediction]:
        """Images that could not be classified."""
        return [prediction for prediction in self.predictions if prediction.error is not None]


class CsvPredictions:
    """Writes predictions to a stream as they come: a row for each class of an image, or one with the error."""

    def __init__(self, stream: TextIO) -> None:
        self._rows = csv.writer(stream, lineterminator="\n")
        self._rows.writerow(("path", "rank", "class", "wnid", "name", "probability", "error"))

    def __call__(self, prediction: Prediction) -> None:
        """Adds one image."""
        if prediction.error is not None:
            self._rows.writerow((prediction.path, "", "", "", "", "", prediction.error))
        for rank, guess in enumerate(prediction.top, start=1):
            probability = f"{guess.probability:.6g}"
            self._rows.writerow((prediction.path, rank, guess.number, guess.wnid, guess.name, probability, ""))


def write_json(result: Classification, target: TextIO | Path) -> None:
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


def _as_json(guess: Guess) -> dict[str, Any]:
    identifier = {"wnid": guess.wnid} if guess.wnid else {}
    return {"class": guess.number, **identifier, "name": guess.name, "probability": guess.probability}
