"""A tiny model on built-in pictures: train, compare with raw pixels and an untrained model, show the result."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.apps.evaluation.datasets import labelled
from dinov2.apps.evaluation.features import RawPixels
from dinov2.apps.evaluation.protocols import knn_of_backbone
from dinov2.apps.pictures import picture_evaluation
from dinov2.apps.train import check_training, run_training, training_config
from dinov2.configs import Config
from dinov2.data.datasets.base import ImageDataset
from dinov2.encode.stream import extract_features
from dinov2.engine.parallel import choose_device, choose_precision
from dinov2.errors import DinoError
from dinov2.eval.result import environment
from dinov2.eval.setup import eval_transform_for
from dinov2.models import build_model_from_cfg
from dinov2.pretrained import load
from dinov2.report.pictures import write_gallery
from dinov2.report.render import require_templates
from dinov2.report.training import write_report
from dinov2.whole_files import write_json

__all__ = ["quickstart"]

_K = 20


def quickstart(
    *,
    output_dir: str | os.PathLike[str] = "runs/quickstart",
    max_steps: int | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """Trains the preset `toy`, evaluates, writes `report.html` and `summary.json`, and returns the summary.

    Keys of the summary: `raw_pixels`, `untrained`, `trained` (k-NN top-1 in per cent), `seconds` of this call, and
    what the figures depend on. Called again it resumes, and when training is done only evaluates.
    """
    began = time.monotonic()
    require_templates()  # before minutes of training
    cfg = training_config(preset="toy", overrides=overrides)
    folder = Path(output_dir)
    train_set, val_set = labelled(cfg.evaluation.knn_train_dataset), labelled(cfg.evaluation.knn_val_dataset)
    check_training(cfg, output_dir=folder)  # what is wrong is said before minutes of measuring
    say("measuring raw pixels and the untrained model")
    figures = {
        "raw_pixels": _top1(RawPixels(), cfg, train_set, val_set, precision="fp32"),
        "untrained": _top1(_untrained(cfg), cfg, train_set, val_set),
    }
    _, outcome = run_training(
        cfg,
        output_dir=folder,
        max_steps=max_steps,
        evaluations=[picture_evaluation(val_set)],
        announce=say,
    )
    if outcome.stopped_by:
        raise DinoError(f"stopped by {outcome.stopped_by} after {outcome.step:,} steps; the same command goes on there")
    trained = load(folder)
    say("measuring the trained model")
    figures["trained"] = _top1(trained.backbone, cfg, train_set, val_set)
    _write_gallery(folder, trained.backbone, cfg, train_set, val_set)
    summary = {**figures, "seconds": round(time.monotonic() - began, 1), "k": _K, "environment": environment()}
    write_json(folder / "summary.json", summary)
    write_report(folder)
    return summary


def _top1(model: nn.Module, cfg: Config, train: ImageDataset, val: ImageDataset, *, precision: str = "auto") -> float:
    rows, _ = knn_of_backbone(
        model, train, val, eval_transform_for(cfg), precision=precision, nb_knn=[_K], device=cfg.train.device
    )
    return round(next(row.value for row in rows if row.metric == "top-1"), 2)


def _untrained(cfg: Config) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.train.seed)
        backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    return backbone.eval()


def _write_gallery(folder: Path, backbone: Any, cfg: Config, train: ImageDataset, val: ImageDataset) -> None:
    device = choose_device(cfg.train.device)
    transform = eval_transform_for(cfg)
    features = [
        extract_features(
            backbone.to(device),
            dataset,
            transform=transform,
            device=device,
            autocast_dtype=choose_precision("auto", device),
        )
        for dataset in (train, val)
    ]
    write_gallery(folder, *features, train_image=train.get_tensor, val_image=val.get_tensor)
