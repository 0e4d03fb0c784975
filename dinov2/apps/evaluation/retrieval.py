"""Retrieval with the features of a model: labelled folders of queries and gallery, or revisited Oxford and Paris."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.apps.evaluation.context import EvalConfig, EvalContext, open_evaluation
from dinov2.apps.evaluation.datasets import EvaluationSets, LabelledDataset, labelled
from dinov2.apps.evaluation.features import FeatureExtractor
from dinov2.apps.evaluation.plan import plan_lines
from dinov2.data.datasets.base import FileDataset, PixelDataset, digest
from dinov2.data.datasets.files import ImageFiles
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.distributed import is_main_process
from dinov2.encode.stream import Features
from dinov2.errors import ConfigError, DataError
from dinov2.eval.metrics import renumber_labels
from dinov2.eval.result import Result, write_results
from dinov2.eval.retrieval import QueryTruth, evaluate_retrieval, truth_by_class
from dinov2.eval.revisited import RevisitedQuery, RevisitedTruth, evaluate_revisited, read_revisited, write_revisited
from dinov2.eval.scoring import class_numbers

__all__ = ["RETRIEVAL_RESULTS_FILE", "SHOWN_PROTOCOL", "Ranked", "RetrievalReport", "retrieval", "retrieval_plan"]

RETRIEVAL_RESULTS_FILE = "results_eval_retrieval.json"
_TRUTH_FILE = "ground_truth.json"

SHOWN_PROTOCOL = "medium"
"""Protocol on the page of a revisited benchmark."""


@dataclass(frozen=True)
class Ranked:
    """Ranked images, by row of the features."""

    extractor: FeatureExtractor
    queries: LabelledDataset
    gallery: LabelledDataset
    query_features: Features
    gallery_features: Features
    truth: list[QueryTruth]
    """By class, or that of `SHOWN_PROTOCOL`."""
    by_class: bool


@dataclass
class RetrievalReport:
    """Figures, and the files that hold them."""

    rows: list[Result]
    ranked: Ranked
    output_dir: Path
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def retrieval(
    config: EvalConfig,
    *,
    query_dataset: str | None = None,
    gallery_dataset: str | None = None,
    ground_truth: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalReport:
    """Ranks a gallery for every query by the class token's cosine similarity, and writes `results_eval_retrieval.json`.

    Args:
        config: model, image size, cache and output; its data sets are not used.
        query_dataset, gallery_dataset: labelled data sets, of which images of the same class (by name, where both know
            names) are right. Without a gallery every query looks for the others of its own set. A query that lies in
            the gallery too does not count as found.
        ground_truth: a ground-truth file of revisited Oxford or Paris instead, of which no code is run (its data is
            written beside the results as `ground_truth.json`, which is taken here too), and
        images: the folder of its images; queries are cropped to their boxes.
        ks: first images that recall and precision are measured among (the revisited protocols have their own).

    Raises `ConfigError` for arguments that do not fit together, `DataError` for images or a truth that do not.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"images are counted from the first, got k = {sorted(ks)}; write numbers from 1")
    with _open(config, query_dataset, gallery_dataset, ground_truth, images) as (context, revisited):
        extractor, queries, gallery = context.extractor(), context.sets.train, context.sets.val
        query_features, gallery_features = (context.cache.features(extractor, one) for one in (queries, gallery))
        is_same = queries is gallery
        provenance = extractor.provenance(gallery.name, split="the others of the same set" if is_same else "")
        if revisited is not None:
            truth = revisited.truth(SHOWN_PROTOCOL)
            complete = _require_all(query_features), _require_all(gallery_features)
            rows = evaluate_revisited(*complete, revisited, device=extractor.device, provenance=provenance)
        else:
            truth = _truth_by_class(queries, gallery, query_features, gallery_features)
            rows = evaluate_retrieval(
                query_features.features,
                gallery_features.features,
                truth,
                ks=ks,
                device=extractor.device,
                provenance=provenance,
            )
        report = RetrievalReport(
            [replace(row, settings={**row.settings, "queries": queries.name, "scales": 1}) for row in rows],
            Ranked(extractor, queries, gallery, query_features, gallery_features, truth, by_class=revisited is None),
            context.folder,
            [*query_features.unreadable, *(() if is_same else gallery_features.unreadable)],
        )
        if is_main_process():
            write_results(context.folder / RETRIEVAL_RESULTS_FILE, report.rows)
            if revisited is not None:
                write_revisited(revisited, context.folder / _TRUTH_FILE)
    return report


def retrieval_plan(
    config: EvalConfig,
    *,
    query_dataset: str | None = None,
    gallery_dataset: str | None = None,
    ground_truth: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Lines that say what `retrieval` would do; nothing is written. Raises what it would raise before its work."""
    with _open(config, query_dataset, gallery_dataset, ground_truth, images) as (context, _):
        sets = (context.sets.train, context.sets.val)
        return plan_lines(context.extractor(), context.cache, sets, folder=context.folder)


@contextmanager
def _open(
    config: EvalConfig,
    query_dataset: str | None,
    gallery_dataset: str | None,
    ground_truth: str | os.PathLike[str] | None,
    images: str | os.PathLike[str] | None,
) -> Iterator[tuple[EvalContext, RevisitedTruth | None]]:
    """The context, whose sets are queries and gallery; what can be wrong is found before features are extracted."""
    if (query_dataset is None) == (ground_truth is None):
        raise ConfigError("give labelled queries (--query-dataset) or a --ground-truth file, one of the two")
    if (ground_truth is None) != (images is None):
        raise ConfigError("a --ground-truth file and the folder of its --images belong together; give both or neither")
    if gallery_dataset is not None and query_dataset is None:
        raise ConfigError("a ground-truth file names its own gallery; leave --gallery-dataset out")
    truth = None
    if query_dataset is not None:
        queries = LabelledDataset(query_dataset, labelled(query_dataset))
        gallery = queries if gallery_dataset is None else LabelledDataset(gallery_dataset, labelled(gallery_dataset))
    else:
        assert ground_truth is not None and images is not None
        truth = read_revisited(ground_truth)
        queries, gallery = _revisited_images(truth, os.fspath(images), os.fspath(ground_truth))
    with open_evaluation(config, task="retrieval", sets=EvaluationSets(queries, gallery)) as context:
        yield context, truth


def _truth_by_class(
    queries: LabelledDataset, gallery: LabelledDataset, own: Features, others: Features
) -> list[QueryTruth]:
    assert own.labels is not None and others.labels is not None  # `labelled` saw to it
    numbers = class_numbers(others, own)  # by name where both know names
    labels = own.labels if numbers is None else renumber_labels(own.labels, numbers)
    return truth_by_class(labels, others.labels, same_image=_same_images(queries, gallery, own, others))


def _same_images(
    queries: LabelledDataset, gallery: LabelledDataset, own: Features, others: Features
) -> Tensor:  # int64 [Q]
    """Row of each query's image in the gallery, -1 for none: the same file, or the same number of the same set."""
    query_numbers, gallery_numbers = _numbers(own), _numbers(others)
    if queries is gallery or queries.images.fingerprint() == gallery.images.fingerprint():
        row_of = {number: row for row, number in enumerate(gallery_numbers)}
        return torch.tensor([row_of.get(number, -1) for number in query_numbers], dtype=torch.int64)
    if not isinstance(queries.images, FileDataset) or not isinstance(gallery.images, FileDataset):
        return torch.full((len(own),), -1)
    row_at = {os.path.realpath(gallery.images.path_of(number)): row for row, number in enumerate(gallery_numbers)}
    rows = [row_at.get(os.path.realpath(queries.images.path_of(number)), -1) for number in query_numbers]
    return torch.tensor(rows, dtype=torch.int64)


def _numbers(features: Features) -> list[int]:
    return list(range(len(features))) if features.indices is None else features.indices.tolist()


def _require_all(features: Features) -> Tensor:
    """The feature matrix; the benchmark knows images by number, so that none may be missing."""
    if features.unreadable:
        path, reason = features.unreadable[0]
        raise DataError(
            f"{len(features.unreadable)} images of the benchmark cannot be read, the first is {path}: {reason}"
        )
    return features.features


def _revisited_images(truth: RevisitedTruth, folder: str, file: str) -> tuple[LabelledDataset, LabelledDataset]:
    name = Path(file).stem.removeprefix("gnd_")
    paths = _found(folder, truth.gallery)
    query_paths = _found(folder, [query.name for query in truth.queries])
    queries = _CroppedQueries(query_paths, truth.queries)
    return LabelledDataset(f"{name}: queries", queries), LabelledDataset(name, ImageFiles(paths))


def _found(folder: str, names: Sequence[str]) -> list[str]:
    """The files of images whose names lack folder and ending: in the folder itself or in its `jpg`."""
    if not os.path.isdir(folder):
        raise DataError(f"there is no folder {folder}; give the folder of the benchmark's images")
    places = [folder, os.path.join(folder, "jpg")]
    endings = ["", ".jpg", *sorted(IMAGE_EXTENSIONS)]
    paths = []
    for name in names:
        candidates = (os.path.join(place, name + ending) for place in places for ending in endings)
        path = next((one for one in candidates if os.path.isfile(one)), None)
        if path is None:
            raise DataError(f"the image {name} of the ground truth is not in {folder}; fetch all of its images")
        paths.append(path)
    return paths


class _CroppedQueries(PixelDataset):
    """Query images cropped to their boxes, without labels."""

    def __init__(self, paths: Sequence[str], queries: Sequence[RevisitedQuery]) -> None:
        super().__init__()
        self._files, self._boxes = ImageFiles(paths), [query.box for query in queries]

    def __len__(self) -> int:
        return len(self._boxes)

    def get_pixels(self, index: int) -> np.ndarray:
        return np.asarray(self.get_image(index))

    def get_image(self, index: int) -> Image.Image:
        image, box = self._files.get_image(index), self._boxes[index]
        if box is None:
            return image
        left, top, right, bottom = (round(side) for side in box)
        return image.crop((max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)))

    def get_target(self, index: int) -> int | None:
        return None

    def get_targets(self) -> np.ndarray | None:
        return None

    def path_of(self, index: int) -> str:
        return self._files.path_of(index)

    def fingerprint(self) -> str:
        # A picture that was edited may keep its name and its size.
        written = [os.stat(self.path_of(index)).st_mtime_ns for index in range(len(self))]
        return digest("cropped", self._files.fingerprint(), repr(self._boxes), repr(written))
