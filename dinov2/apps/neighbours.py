"""Nearest images and near-duplicates among features on disk: `dinov2 neighbours`."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.apps.places import output_folder
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.files import ImageFiles
from dinov2.data.decoding import decode_rgb
from dinov2.data.image_files import read_image
from dinov2.data.loaders import make_dataset
from dinov2.encode.store import StoredFeatures, open_features
from dinov2.encode.stream import EmbeddingSpec, decoded_batches, encode_batch
from dinov2.engine.parallel import choose_device
from dinov2.errors import ConfigError, DataError
from dinov2.eval.duplicates import groups_of_pairs, similar_pairs
from dinov2.eval.knn.search import nearest_neighbours
from dinov2.pretrained import load
from dinov2.report.neighbours import THUMBNAIL_SIDE, Shot, ShotRow, neighbour_page, thumbnail
from dinov2.report.render import require_templates
from dinov2.whole_files import write_text

__all__ = ["Hit", "NeighboursReport", "neighbours"]

_MOST_GROUPS, _MOST_SHOTS = 100, 24  # on the page; the JSON file has all
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Hit:
    """One neighbour of a query."""

    row: int
    path: str
    similarity: float
    label: str | None = None


@dataclass
class NeighboursReport:
    """Result of the search."""

    features: Path
    rows: int
    neighbours: dict[str, list[Hit]] = field(default_factory=dict)
    """By path of the query, nearest first."""
    threshold: float | None = None
    pairs: list[tuple[str, str, float]] = field(default_factory=list)
    """Paths of near-duplicates and their similarity, most similar first."""
    groups: list[list[str]] = field(default_factory=list)
    """Near-duplicates that hang together, the largest group first."""
    page: Path | None = None


def neighbours(
    features: str | os.PathLike[str],
    *,
    queries: Sequence[str] = (),
    model: str | None = None,
    k: int = 10,
    column: str = "cls",
    duplicates: float | None = None,
    samples: int = 12,
    images: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    device: str = "auto",
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda label: None,
) -> NeighboursReport:
    """Finds the `k` nearest images of each query by cosine similarity, and writes a page with pictures.

    Args:
        features: what `dinov2 embed` wrote.
        queries: image files; without any, and unless `duplicates` is given, `samples` of the stored images.
        model: what the queries go through; None is the model that the features are of.
        column: the feature compared: `cls`, `mean`, `layer<i>_cls`, ...
        duplicates: a similarity; pairs of stored images at least that similar are listed and grouped.
        images: the folder that the stored paths are relative to, where it is another one by now.
        output: the page; None is `<features>.neighbours.html`.

    Raises:
        DataError: there are no such features, or a query cannot be read.
        ConfigError: the column or model does not fit, or the page cannot be written.
    """
    for what, value in (("the number of neighbours", k), ("the number of samples", samples)):
        if value < 1:
            raise ConfigError(f"{what} is {value}; write 1 or more")
    if duplicates is not None and not -1 < duplicates <= 1:
        raise ConfigError(f"a cosine similarity of {duplicates} does not exist; write a number such as 0.95")
    stored = open_features(features)
    require_templates()  # before the search
    report = NeighboursReport(stored.path, len(stored), page=_page(stored.path, output))
    search = _Search(report, _matrix(stored, column), _Album(stored, images), choose_device(device))
    album, shown, groups = search.album, list[ShotRow](), None
    if queries:
        vectors, pictures = _query_vectors(stored, queries, model, column, device)
        shots = [
            Shot(thumbnail(picture), Path(path).name, "query", path, "query")
            for path, picture in zip(queries, pictures, strict=True)
        ]
        same = torch.tensor([album.row_of(path) for path in queries])
        shown = search.nearest(vectors, same, list(queries), shots, [None] * len(queries), k)
    elif duplicates is None:
        rows = torch.linspace(0, len(stored) - 1, min(samples, len(stored))).round().long().unique()
        names, labels = [album.paths[row] for row in rows.tolist()], [album.label(row) for row in rows.tolist()]
        shots = [album.shot(row, "query", "query") for row in rows.tolist()]
        shown = search.nearest(search.matrix[rows], rows, names, shots, labels, k)
    lead = ""
    if duplicates is not None:
        groups = search.duplicates(duplicates, progress("comparing images"))
        lead = (
            f"{len(report.pairs):,} pairs with a cosine similarity of at least {duplicates}, "
            f"in {len(report.groups):,} groups."
        )
        if len(report.groups) > _MOST_GROUPS:
            lead += f" The {_MOST_GROUPS} largest are shown."
    request, facts = stored.manifest.get("request", {}), [("images", f"{len(stored):,}")]
    if request:
        facts += [("model", str(request["model"]["name"])), ("size", f"{request['transform']['size']} px")]
    page = neighbour_page(stored.path.name, facts=facts, neighbours=shown, duplicates=groups, duplicates_lead=lead)
    assert report.page is not None
    write_text(report.page, page)
    return report


def _page(features: Path, output: str | os.PathLike[str] | None) -> Path:
    page = features.with_name(f"{features.name}.neighbours.html") if output is None else Path(output).expanduser()
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"the page {page} is no .html file; write for example -o neighbours.html")
    if page.is_dir():
        raise ConfigError(f"the page {page} is a folder; write a file name")
    output_folder(page.absolute().parent, task="neighbours")
    return page


def _matrix(stored: StoredFeatures, column: str) -> Tensor:  # [S, D]
    values = stored.read(column)
    if values.ndim != 2:
        vectors = [name for name in stored.columns if name.endswith(("cls", "mean"))]
        raise ConfigError(f"the column {column!r} holds no vectors to compare; choose one of {', '.join(vectors)}")
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


class _Album:
    """The pictures behind the rows: files where there are any, else what the data set gives."""

    def __init__(self, stored: StoredFeatures, images: str | os.PathLike[str] | None) -> None:
        self._stored = stored
        named = "path" in stored.columns
        self.paths: list[str] = stored.read("path").tolist() if named else [f"row {n}" for n in range(len(stored))]
        self._root = Path(images).expanduser() if images is not None else Path(stored.manifest.get("root") or ".")
        if images is not None and not self._root.is_dir():
            raise DataError(f"there is no folder {self._root}; give the folder of the images")
        self._labels = stored.read("label") if "label" in stored.columns else None
        self._names = stored.manifest.get("class_names")
        self._dataset: ImageDataset | None = None
        self._kept: dict[int, bytes | None] = {}

    def label(self, row: int) -> str | None:
        if self._labels is None or self._labels[row] < 0:
            return None
        number = int(self._labels[row])
        return str(number) if self._names is None else str(self._names[number])

    def row_of(self, path: str) -> int:
        """The row of a file, -1 when it has none."""
        full, root = os.path.realpath(path), os.path.join(os.path.realpath(self._root), "")
        wanted = {full, full.removeprefix(root)}
        return next((row for row, name in enumerate(self.paths) if name in wanted), -1)

    def shot(self, row: int, note: str, kind: str = "") -> Shot:
        path = self.paths[row]
        if row not in self._kept:
            self._kept[row] = self._thumbnail(row)
        return Shot(self._kept[row], Path(path).name, note, path, kind)

    def _thumbnail(self, row: int) -> bytes | None:
        try:
            file = self._root / self.paths[row]
            if file.is_file():
                data = read_image(file)
                return thumbnail(decode_rgb(data, path=str(file), exif="apply", min_side=THUMBNAIL_SIDE))
            if self._dataset is None:
                self._dataset = make_dataset(self._stored.manifest.get("source") or "")
            return thumbnail(self._dataset.get_image(int(self._stored.read("index")[row])))
        except (DataError, IndexError, TypeError, AttributeError):  # gone, or a source of several files
            return None


def _query_vectors(
    stored: StoredFeatures, queries: Sequence[str], model: str | None, column: str, device: str
) -> tuple[Tensor, list[Image.Image]]:
    """Vectors [Q, D] of image files, through the model and transform of the stored ones, and the images."""
    request = stored.manifest.get("request", {})
    source = model or stored.manifest.get("model")
    if source is None:
        raise ConfigError(f"{stored.path} has lost its manifest, which names its model; give --model")
    for path in queries:
        if not os.path.isfile(path):
            raise DataError(f"there is no image file {path}; check the path")
    dataset = ImageFiles(list(queries))
    precision = _PRECISIONS.get(request.get("precision", ""), "auto")
    stride = request.get("model", {}).get("stride")
    loaded = load(source, device=device, precision=precision, stride=stride)
    if request and not loaded.has_digest(request["model"]["sha256"]):
        raise ConfigError(
            f"the features in {stored.path} are of other weights than {source} ({request['model']['sha256'][:12]}, not "
            f"{loaded.digest[:12]}); give --model the weights of then, or embed the images again"
        )
    kept = request.get("transform", {})
    transform = loaded.transform
    if kept and (kept["size"], kept["fit"]) != (transform.crop_size, transform.fit):
        transform = transform.with_(
            crop_size=kept["size"], fit=kept["fit"], patch_size=loaded.patch_size, max_tokens=kept.get("max_tokens")
        )
    prefix, _, kind = column.rpartition("_")
    layers = (int(prefix.removeprefix("layer")),) if prefix else ()
    vectors, images = [], []
    single = [range(number, number + 1) for number in range(len(dataset))]
    channels = loaded.in_chans
    spec = EmbeddingSpec(mean=kind == "mean", layers=layers)
    batches = decoded_batches(dataset, single, transform=transform, channels=channels)
    for batch in batches:
        if batch.unreadable:
            raise DataError(batch.unreadable[0][1])
        columns = encode_batch(lambda pixels: spec.columns(loaded.encode(pixels, layers=layers)), batch)
        vectors.append(columns[column].float().cpu())
        images.append(dataset.get_image(batch.indices[0]))
    return torch.cat(vectors), images


@dataclass
class _Search:
    """Rows of pictures that a search gives; what it finds goes into the report."""

    report: NeighboursReport
    matrix: Tensor
    """[S, D]"""
    album: _Album
    device: torch.device

    def nearest(
        self,
        vectors: Tensor,
        same: Tensor,  # int64 [Q]: the query's own row, -1 for none
        names: Sequence[str],
        shots: Sequence[Shot],
        labels: Sequence[str | None],
        k: int,
    ) -> list[ShotRow]:
        """The neighbours of the queries."""
        exclude = same if bool((same >= 0).any()) else None
        k = min(k, len(self.matrix) - (exclude is not None))
        if k < 1:
            raise DataError(f"{self.report.features} holds one image alone, which has no neighbours")
        similarities, indices = nearest_neighbours(
            vectors, self.matrix, k=k, cosine=True, exclude=exclude, device=self.device
        )
        shown = []
        found = zip(similarities.tolist(), indices.tolist(), strict=True)
        for name, shot, label, (near, rows) in zip(names, shots, labels, found, strict=True):
            hits = [
                Hit(row, self.album.paths[row], value, self.album.label(row))
                for value, row in zip(near, rows, strict=True)
            ]
            self.report.neighbours[name] = hits
            pictures = [shot]
            for hit in hits:
                kind = "" if label is None or hit.label is None else "right" if label == hit.label else "wrong"
                pictures.append(self.album.shot(hit.row, f"{hit.similarity:.3f}", kind))
            shown.append(ShotRow(tuple(pictures)))
        return shown

    def duplicates(self, threshold: float, progress: Callable[[int, int], None] | None) -> list[ShotRow]:
        """The largest groups of images that are at least that similar."""
        # Of two equal rows the product of unit vectors may be one bit below 1.
        pairs, similarities = similar_pairs(
            self.matrix, threshold=min(threshold, 1 - 1e-6), device=self.device, progress=progress
        )
        paths, groups, closest = self.album.paths, groups_of_pairs(pairs), dict[int, float]()
        for (a, b), value in zip(pairs.tolist(), similarities.tolist(), strict=True):
            self.report.pairs.append((paths[a], paths[b], min(1.0, value)))
            for row in (a, b):
                closest[row] = max(closest.get(row, -math.inf), value)
        self.report.threshold = threshold
        self.report.groups = [[paths[row] for row in group] for group in groups]
        shown = []
        for group in groups[:_MOST_GROUPS]:
            more = len(group) - _MOST_SHOTS
            shots = tuple(self.album.shot(row, f"{min(1.0, closest[row]):.4f}") for row in group[:_MOST_SHOTS])
            shown.append(ShotRow(shots, f"and {more:,} more" if more > 0 else ""))
        return shown
