"""From a run or a weight file to a backbone that is ready to use, with the preprocessing that belongs to it."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.configs import Config
from dinov2.errors import ConfigError, WeightsError
from dinov2.eval.setup import EvalTransform
from dinov2.models import build_model_from_cfg
from dinov2.models.recognise import recognise
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.models.weights import LoadReport, backbone_state, build_from_table, load_into, model_table, read_file
from dinov2.train.run_folder import RunFolder

__all__ = ["Pretrained", "load"]


@dataclass(frozen=True)
class Pretrained:
    """A backbone in eval mode, its transform, and where it comes from."""

    backbone: DinoVisionTransformer
    transform: EvalTransform
    table: dict[str, Any]
    source: Path
    digest: str
    """SHA-256 of the weight file."""
    report: LoadReport

    def untrained(self, *, seed: int = 0) -> nn.Module:
        """A backbone of the same architecture with fresh weights, for comparison."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_from_table(self.table).eval()


def load(source: str | os.PathLike[str], *, cfg: Config | None = None) -> Pretrained:
    """Loads a backbone strictly from a run's folder (its newest exported teacher) or from a weight file.

    The architecture is that of `cfg` when given, else of the file's own table, else worked out from the tensors. Raises
    `WeightsError` when the file does not hold exactly that backbone.
    """
    if not str(source):
        raise WeightsError("no model was named; give a weight file or a run's folder")
    if "://" in str(source):
        raise WeightsError(f"{source} is a URL; download the file first and give its path")
    path = Path(source).expanduser()
    if path.is_dir():
        path = RunFolder(path).latest_teacher()
    content = read_file(path)
    table = content.get("model")
    if cfg is not None:
        table = _table_from_config(cfg)
    elif not isinstance(table, dict) or "embed_dim" not in table:
        table = recognise(backbone_state(content)[0], source=str(path))
    backbone = build_from_table(table).eval()
    report = load_into(backbone, content, source=str(path))
    return Pretrained(backbone, _transform_for(table), table, path, _sha256(path), report)


def _table_from_config(cfg: Config) -> dict[str, Any]:
    """The table that a configuration describes; where it and the tensors disagree, loading fails."""
    try:
        with torch.device("meta"):
            backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model_table(backbone, mean=cfg.crops.mean, std=cfg.crops.std)


def _transform_for(table: dict[str, Any]) -> EvalTransform:
    normalisation = {key: table[key] for key in ("mean", "std") if table.get(key)}
    # Weights trained at 518 pixels are evaluated at 224, as published; others at the size they were trained at.
    size = 224 if table["img_size"][0] > 224 else table["img_size"][0]
    return EvalTransform(crop_size=size // table["patch_size"] * table["patch_size"], **normalisation)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
