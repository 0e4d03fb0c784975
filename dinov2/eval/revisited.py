"""The revisited Oxford and Paris benchmarks: their ground-truth file, read safely, and the three protocols.

A ground-truth file (`gnd_roxford5k.pkl`) is a Python pickle, which may run any code when it is loaded. Here only
dictionaries, lists, texts, numbers and arrays of numbers are let in, and what comes out is written as JSON once. Its
fields: `imlist` and `qimlist` (names of gallery and query images without ending), and `gnd` with, for each query, `bbx`
(the box that the query is cropped to) and the gallery numbers in `easy`, `hard` and `junk`.

    protocol  right        ignored
    easy      easy         junk, hard
    medium    easy, hard   junk
    hard      hard         junk, easy

Radenovic et al. 2018, "Revisiting Oxford and Paris: large-scale image retrieval benchmarking".
"""

import io
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DataError
from dinov2.eval.result import Result
from dinov2.eval.retrieval import QueryTruth, evaluate_retrieval
from dinov2.eval.scoring import Provenance
from dinov2.whole_files import write_json

__all__ = [
    "REVISITED_PROTOCOLS",
    "RevisitedQuery",
    "RevisitedTruth",
    "evaluate_revisited",
    "read_revisited",
    "write_revisited",
]

REVISITED_PROTOCOLS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""By protocol: the lists whose images are right, and those whose images are ignored."""

_KS = (1, 5, 10)


@dataclass(frozen=True)
class RevisitedQuery:
    """One query: its box (left, top, right, bottom in pixels; None is the whole image) and lists of gallery numbers."""

    name: str
    box: tuple[float, float, float, float] | None
    easy: tuple[int, ...]
    hard: tuple[int, ...]
    junk: tuple[int, ...]


@dataclass(frozen=True)
class RevisitedTruth:
    """A ground-truth file."""

    gallery: tuple[str, ...]
    """Names of the gallery's images, in the order of their numbers."""
    queries: tuple[RevisitedQuery, ...]

    def truth(self, protocol: str) -> list[QueryTruth]:
        """Right and ignored images of each query by `easy`, `medium` or `hard`."""
        right, ignored = REVISITED_PROTOCOLS[protocol]

        def numbers(query: RevisitedQuery, lists: tuple[str, ...]) -> Tensor:
            return torch.tensor([number for name in lists for number in getattr(query, name)], dtype=torch.int64)

        return [QueryTruth(numbers(query, right), numbers(query, ignored)) for query in self.queries]


def evaluate_revisited(
    queries: Tensor,  # [Q, D]
    gallery: Tensor,  # [S, D]
    truth: RevisitedTruth,
    *,
    device: torch.device | str | None = None,
    provenance: Provenance | None = None,
) -> list[Result]:
    """mAP (trapezoid), mP@1, 5, 10 and recall of the three protocols, in percent; `settings` name the protocol.

    Features are of the queries cropped to their boxes and of the whole gallery, in the order of the ground truth. A
    protocol without a right image for any query has no rows.
    """
    rows = []
    for protocol in REVISITED_PROTOCOLS:
        one = truth.truth(protocol)
        if not any(len(query.positives) for query in one):
            continue
        found = evaluate_retrieval(
            queries, gallery, one, ks=_KS, precision="trapezoid", device=device, task="revisited", provenance=provenance
        )
        for row in found:
            if row.metric != "GAP":  # every query has a match, so that GAP would measure something else
                rows.append(Result(**{**vars(row), "settings": {**row.settings, "protocol": protocol}}))
    return rows


def read_revisited(path: str | os.PathLike[str]) -> RevisitedTruth:
    """A ground-truth file: the published pickle, of which only data is read, or the JSON of `write_revisited`.

    Raises `DataError` when it cannot be read, asks for code, or does not say what it should.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    try:
        document = json.loads(data) if data.lstrip()[:1] == b"{" else _DataUnpickler(io.BytesIO(data)).load()
    except DataError as error:
        raise DataError(f"{path} is not read: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{path} is neither a pickle nor JSON of ground truth ({type(error).__name__}: {error}); fetch it again"
        ) from error
    try:
        return _truth_from(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is no ground truth of revisited Oxford or Paris ({error}); expected imlist, qimlist and gnd"
        ) from error


def write_revisited(truth: RevisitedTruth, path: Path | str) -> Path:
    """Write the ground truth as JSON, which `read_revisited` reads."""
    gnd = [
        {"bbx": query.box, **{name: value for name, value in asdict(query).items() if name in ("easy", "hard", "junk")}}
        for query in truth.queries
    ]
    return write_json(path, {"imlist": truth.gallery, "qimlist": [query.name for query in truth.queries], "gnd": gnd})


def _truth_from(document: Any) -> RevisitedTruth:
    gallery = tuple(str(name) for name in document["imlist"])
    names, entries = [str(name) for name in document["qimlist"]], list(document["gnd"])
    if len(names) != len(entries):
        raise ValueError(f"{len(names)} queries and {len(entries)} entries")
    queries = []
    for name, entry in zip(names, entries, strict=True):
        lists = {key: tuple(_whole(number) for number in entry.get(key, ())) for key in ("easy", "hard", "junk")}
        named = [number for numbers in lists.values() for number in numbers]
        if len(set(named)) < len(named):
            raise ValueError(f"{name} has an image in two of its lists")
        if named and (min(named) < 0 or max(named) >= len(gallery)):
            raise ValueError(f"{name} names image {max(named)} of a gallery of {len(gallery)}")
        queries.append(RevisitedQuery(name, _box(entry.get("bbx"), name), **lists))
    return RevisitedTruth(gallery, tuple(queries))


def _whole(number: float) -> int:
    if int(number) != number:
        raise ValueError(f"{number!r} is no image number")
    return int(number)


def _box(values: Iterable[float] | None, name: str) -> tuple[float, float, float, float] | None:
    if values is None:
        return None
    left, top, right, bottom = (float(value) for value in values)
    if not (left < right and top < bottom):
        raise ValueError(f"the box of {name} is empty: {left}, {top}, {right}, {bottom}")
    return left, top, right, bottom


class _DataUnpickler(pickle.Unpickler):
    """Unpickles numbers, texts, lists and dictionaries; arrays become `_Array`, anything else is refused by name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")  # the names in pickles of Python 2

    def find_class(self, module: str, name: str) -> object:
        match module.replace("numpy._core", "numpy.core"), name:
            case ("numpy", "ndarray") | ("numpy.core.multiarray", "_reconstruct"):
                return _Array
            case "numpy.core.numeric", "_frombuffer":
                return _array_of
            case "numpy", "dtype":
                return _NumberType
            case "numpy.core.multiarray", "scalar":
                return _number
            case "_codecs", "encode":
                return _encode
        raise DataError(f"it asks for {module}.{name}, which no ground truth needs; do not trust this file")


# A pickle may set the inner state of a real array or type to anything, wild pointers included. These stand-ins take the
# same instructions and read plain bytes.


class _NumberType:
    def __init__(self, code: str, *rest: object) -> None:
        self.type = np.dtype(code)
        if self.type.kind not in "biufSUO":
            raise DataError(f"it holds an array of {self.type}, which is no list of numbers; do not trust this file")

    def __setstate__(self, state: Sequence[object]) -> None:
        if state[1] == "<" or state[1] == ">":
            self.type = self.type.newbyteorder(state[1])


class _Array:
    def __init__(self, *ignored: object) -> None:
        self.values: list[object] = []

    def __setstate__(self, state: tuple[object, object, "_NumberType", object, "str | bytes | list[object]"]) -> None:
        _, _, kind, _, data = state
        # Arrays of objects come as a list, whose items have passed through here already.
        self.values = data if isinstance(data, list) else _read(kind, data)

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)


def _array_of(data: bytes | bytearray, kind: _NumberType, *ignored: object) -> _Array:
    """Form of arrays since pickle protocol 5."""
    array = _Array()
    array.values = _read(kind, bytes(data))
    return array


def _read(kind: _NumberType, data: str | bytes) -> list[object]:
    if kind.type.kind == "O":
        raise DataError("it holds an array of objects that are no list; do not trust this file")
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind.type).tolist()


def _number(kind: _NumberType, data: str | bytes) -> object:
    return _read(kind, data)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Form in which Python 3 writes bytes into old pickles."""
    return text.encode("latin1")
