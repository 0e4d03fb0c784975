"""Teachers of training runs: the newest export of a run's folder, or one made from its newest checkpoint."""

import re
from pathlib import Path

import torch

from dinov2.checkpoints.files import save_teacher
from dinov2.configs import Config, load_config
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.engine.state_tree import must_fit
from dinov2.errors import WeightsError
from dinov2.models import build_model_from_cfg
from dinov2.models.config import BackboneConfig

__all__ = ["export_from_checkpoint", "newest_teacher"]

# Exports on the way, named by their 0-based iteration, and those of --eval-only, named by the steps done.
_EXPORT = re.compile(r"training_(\d+)|manual_(\d+)", re.ASCII)


def newest_teacher(run: Path) -> Path:
    """The newest exported teacher of a run's folder; where there is none, that of the newest checkpoint is exported.

    Raises `WeightsError` when there is neither.
    """
    exports: dict[int, Path] = {}  # by the number of steps done
    for file in run.glob("eval/*/teacher_checkpoint.pth"):
        if name := _EXPORT.fullmatch(file.parent.name):
            exports[int(name[1]) + 1 if name[1] else int(name[2])] = file
    if exports:
        return exports[max(exports)]
    step = CheckpointStore(run / "checkpoints").latest()
    if step is None or not (run / "config.yaml").exists():
        raise WeightsError(
            f"{run} holds no exported teacher (eval/training_<it>/teacher_checkpoint.pth, written at the end of a run "
            "and every evaluation.eval_period_iterations steps) and no checkpoint; give a run's folder or a weight file"
        )
    return export_from_checkpoint(run, step, load_config(str(run / "config.yaml")))


def export_from_checkpoint(run: Path, step: int, cfg: Config) -> Path:
    """Write the teacher of the checkpoint of `step` to `eval/manual_<step>/` of the run and return the file.

    Raises `WeightsError` when the checkpoint is damaged or is not of the architecture in `cfg`.
    """
    with torch.device("meta"):
        backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    saved = CheckpointStore(run / "checkpoints").load(step).get("model", {})
    teacher = {key.removeprefix("teacher."): value for key, value in saved.items() if key.startswith("teacher.")}
    given = {"backbone": {key: value for key, value in teacher.items() if key.startswith("backbone.")}}
    must_fit(given, {"backbone": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}})
    file = run / "eval" / f"manual_{step}" / "teacher_checkpoint.pth"
    save_teacher(file, teacher, BackboneConfig.from_model(backbone, mean=cfg.crops.mean, std=cfg.crops.std))
    return file
