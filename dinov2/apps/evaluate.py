"""k-NN accuracy of a trained backbone on labelled images, beside raw pixels and an untrained backbone on request."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinov2 import distributed
from dinov2.apps.places import output_folder
from dinov2.apps.transformed import WithTransform
from dinov2.configs import load_config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import EvalTransform
from dinov2.data.loaders import make_dataset
from dinov2.engine.parallel import choose_device, choose_precision
from dinov2.errors import ConfigError, DataError
from dinov2.eval.baselines import RawPixels
from dinov2.eval.knn import evaluate_knn, write_knn_results
from dinov2.features.extract import Features, extract_features
from dinov2.features.results import Result
from dinov2.pretrained import Pretrained, load
from dinov2.sources import ShowProgress

__all__ = ["KnnReport", "knn", "knn_of_backbone", "labelled"]

_Say = Callable[[str], None]


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
    *,
    model: str | os.PathLike[str],
    train_dataset: str,
    val_dataset: str,
    output_dir: str | os.PathLike[str] | None = None,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
    baselines: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    device: str = "auto",
    precision: str = "auto",
    say: _Say = lambda text: None,
    progress: ShowProgress = lambda label: None,
) -> KnnReport:
    """Evaluates a run (its newest teacher) or a weight file and writes `results_eval_knn.json`.

    Raises `DataError` when a data set has no labels, `WeightsError` when the weights do not fit.
    """
    # Everything that can be wrong is looked at before features are extracted, which may take hours.
    vote: dict[str, Any] = {
        "nb_knn": nb_knn, "temperature": temperature, "n_per_class_list": n_per_class_list, "n_tries": n_tries
    }  # fmt: skip
    _check(**vote, batch_size=batch_size, num_workers=num_workers)
    folder = output_folder(output_dir, task="knn")
    cfg = load_config(config_file, overrides) if config_file or overrides else None
    where = choose_device(device)
    loaded = load(model, cfg=cfg, device=where, precision=precision, progress=progress)
    train, val = labelled(train_dataset), labelled(val_dataset)
    say(f"{loaded.source}: {loaded.report}")
    options: dict[str, Any] = {
        "batch_size": batch_size, "num_workers": num_workers, "device": where, "channels": loaded.table["in_chans"]
    }  # fmt: skip
    report = KnnReport(rows=[], output_dir=folder)
    entries: list[tuple[str, Any, str]] = [("trained", loaded.backbone, precision)]
    if baselines:
        entries += [("untrained", loaded.untrained(), precision), ("raw_pixels", RawPixels(), "fp32")]
    for name, backbone, kind in entries:
        provenance = {
            "dataset": val_dataset,
            "model": _described(loaded, name),
            "transform": loaded.transform.describe(),
        }
        rows, unreadable = knn_of_backbone(
            backbone, train, val, loaded.transform, precision=kind, provenance=provenance, label=name,
            progress=progress, **options, **vote,
        )  # fmt: skip
        if name == "trained":
            report.rows, report.unreadable = rows, unreadable
        else:
            report.baselines[name] = rows
    write_knn_results(folder, report.rows, baselines=[row for rows in report.baselines.values() for row in rows])
    return report


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
    provenance: Mapping[str, Any] | None = None,
    label: str = "model",
    progress: ShowProgress = lambda label: None,
    **vote: Any,
) -> tuple[list[Result], list[tuple[str, str]]]:
    """k-NN rows of any callable `[B, C, H, W] -> [B, D]`, and the images that could not be read.

    Images have the number of `channels` given, else that of the backbone, else 3.
    """
    where = device if isinstance(device, torch.device) else choose_device(device)
    features: list[Features] = []
    for which, dataset in (("train", train), ("val", val)):
        features.append(
            extract_features(
                backbone.to(where),
                WithTransform(dataset, transform, channels=channels or _channels(backbone)),
                batch_size=batch_size,
                num_workers=num_workers,
                device=where,
                autocast_dtype=choose_precision(precision, where),
                progress=progress(f"{label}: {which} features"),
            )
        )
    autocast_dtype = choose_precision(precision, where)
    measured = {"precision": str(autocast_dtype or torch.float32).removeprefix("torch."), **(provenance or {})}
    rows = evaluate_knn(*features, device=where, provenance=measured, **vote)
    return rows, [failure for part in features for failure in part.unreadable]


def labelled(dataset: str) -> ImageDataset:
    """The data set of a string or path; raises `DataError` when it has no labels."""
    images = make_dataset(dataset)
    if images.get_targets() is None:
        raise DataError(
            f"{dataset} has no labels, which k-NN evaluation needs; sort the images into one folder a class, "
            "or give a list:FILE with a label column"
        )
    return images


def _check(
    *,
    nb_knn: Sequence[int],
    temperature: float,
    n_per_class_list: Sequence[int],
    n_tries: int,
    batch_size: int,
    num_workers: int,
) -> None:
    counts = {"a number of neighbours": min(nb_knn, default=0), "the number of tries": n_tries, "the batch": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; write 1 or more")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"the temperature is {temperature}; write a number above 0, such as 0.07")
    if 0 in n_per_class_list:
        raise ConfigError("0 images per class were asked for; write a positive number, or -1 for all images")
    if num_workers < 0:
        raise ConfigError(f"the number of workers is {num_workers}; write 0 to load in this process")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not distributed.is_enabled():  # each would do all the work, and write the same file
        raise ConfigError(f"{launched} processes were launched, but k-NN runs in one; start it without torchrun")


def _channels(backbone: Any) -> int:
    return int(getattr(getattr(backbone, "patch_embed", None), "in_chans", 3))


def _described(loaded: Pretrained, name: str) -> dict[str, Any]:
    if name == "raw_pixels":
        return {"name": "raw normalised pixels"}
    known = ("embed_dim", "depth", "patch_size", "num_register_tokens")
    architecture = {key: loaded.table[key] for key in known}
    if name == "untrained":
        return {"name": "untrained backbone", **architecture}
    return {"name": loaded.name, "sha256": loaded.digest, **architecture}
