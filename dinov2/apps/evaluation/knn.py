"""k-NN accuracy of a trained backbone on labelled images, beside raw pixels and an untrained backbone on request."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinov2.apps.evaluation.session import Inputs, session, with_split
from dinov2.apps.evaluation.subjects import raw_pixels, untrained_twin
from dinov2.checkpoints.locate import ShowProgress
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.stream import Features, extract_features
from dinov2.engine.parallel import choose_device, choose_precision
from dinov2.errors import ConfigError
from dinov2.eval.knn.evaluate import SEARCHES, evaluate_knn
from dinov2.eval.knn.release import write_knn_results
from dinov2.eval.knn.search import nearest_neighbours
from dinov2.eval.result import Result
from dinov2.eval.scoring import Provenance

__all__ = ["KnnReport", "check_vote", "knn", "knn_of_backbone"]


@dataclass
class KnnReport:
    """Rows of the evaluated model and of each baseline, and where they were written."""

    rows: list[Result]
    baselines: dict[str, list[Result]] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    output_dir: Path | None = None

    def best_top1(self, name: str = "trained") -> float:
        """Highest top-1 over k of `trained`, `raw_pixels` or `untrained`, in percent."""
        rows = self.rows if name == "trained" else self.baselines[name]
        return max(row.value for row in rows if row.metric == "top-1")


def knn(
    inputs: Inputs,
    *,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
    search: str = "exact",
    baselines: bool = False,
) -> KnnReport:
    """Evaluates any model that `dinov2.load` knows and writes `results_eval_knn.json`.

    Arguments of the vote and the `search` are those of `dinov2.eval.knn.evaluate_knn`. Started by torchrun, the
    processes share the work, and the main one writes.

    Raises `DataError` when a data set has no labels, `WeightsError` when the weights do not fit, and what `check_vote`
    raises.
    """
    vote: dict[str, Any] = {
        "nb_knn": nb_knn,
        "temperature": temperature,
        "n_per_class_list": n_per_class_list,
        "n_tries": n_tries,
        "search": search,
    }
    check_vote(**vote)
    with session(inputs, task="knn") as opened:
        subjects = {"trained": opened.subject()}
        if baselines:
            subjects |= {"untrained": untrained_twin(opened.loaded), "raw_pixels": raw_pixels(opened.loaded)}
        report = KnnReport(rows=[], output_dir=opened.folder)
        for name, subject in subjects.items():
            train, val = opened.features(subject)
            rows = evaluate_knn(train, val, device=subject.device, provenance=opened.provenance(subject), **vote)
            rows = with_split(rows, opened.sets)
            if name == "trained":
                report.rows, report.unreadable = rows, opened.unreadable(subject)
            else:
                report.baselines[name] = rows
            opened.bank.forget()
        write_knn_results(
            opened.folder, report.rows, baselines=[row for rows in report.baselines.values() for row in rows]
        )
    return report


def check_vote(
    *,
    nb_knn: Sequence[int],
    temperature: float,
    n_per_class_list: Sequence[int],
    n_tries: int,
    search: str = "exact",
) -> None:
    """Raises `ConfigError` for a vote that cannot be held, `MissingDependency` for a search that is not installed."""
    counts = {"a number of neighbours": min(nb_knn, default=0), "the number of tries": n_tries}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; write 1 or more")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"the temperature is {temperature}; write a number above 0, such as 0.07")
    if 0 in n_per_class_list:
        raise ConfigError("0 images per class were asked for; write a positive number, or -1 for all images")
    if search not in SEARCHES:
        raise ConfigError(f"no search is called {search!r}; choose {', '.join(SEARCHES)}")
    if search != "exact":
        nearest_neighbours(torch.ones(1, 1), torch.ones(1, 1), k=1, backend="faiss")  # whether it is installed


def knn_of_backbone(
    backbone: Any,
    train: ImageDataset,
    val: ImageDataset,
    transform: EvalTransform,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
    channels: int | None = None,
    provenance: Provenance | None = None,
    label: str = "model",
    progress: ShowProgress = lambda label: None,
    **vote: Any,
) -> tuple[list[Result], list[tuple[str, str]]]:
    """k-NN rows of any callable `[B, C, H, W] -> [B, D]`, and the images that could not be read; nothing is kept.

    Images have the number of `channels` given, else that of the backbone, else 3.
    """
    where = device if isinstance(device, torch.device) else choose_device(device)
    autocast_dtype = choose_precision(precision, where)
    features: list[Features] = [
        extract_features(
            backbone.to(where),
            dataset,
            transform=transform,
            channels=channels or _channels(backbone),
            batch_size=batch_size,
            num_workers=num_workers,
            device=where,
            autocast_dtype=autocast_dtype,
            progress=progress(f"{label}: {which} features"),
        )
        for which, dataset in (("train", train), ("val", val))
    ]
    measured: Provenance = {
        "precision": str(autocast_dtype or torch.float32).removeprefix("torch."),
        **(provenance or {}),
    }
    rows = evaluate_knn(*features, device=where, provenance=measured, **vote)
    return rows, [failure for part in features for failure in part.unreadable]


def _channels(backbone: Any) -> int:
    return int(getattr(getattr(backbone, "patch_embed", None), "in_chans", 3))
