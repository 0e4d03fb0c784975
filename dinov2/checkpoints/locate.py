"""Weights by the name of a model: a release, a file, a run, a Hugging Face folder or id, a URL.

An existing path always wins. Names are looked up before anything is asked of the network, and whatever is fetched is
cached (`dinov2.checkpoints.download`).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dinov2.checkpoints.download import download
from dinov2.errors import MissingDependency, WeightsError
from dinov2.models.config import BackboneConfig
from dinov2.models.releases import Release, backbone_config, release

__all__ = ["CheckpointLocation", "ShowProgress", "locate_checkpoint"]

ShowProgress = Callable[[str], Callable[[int, int], None] | None]
"""Called with what is being done; gives a function of (done, in all), or None where nobody would see it."""

_WEIGHT_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors", ".ckpt"}
_HUGGING_FACE_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUGGING_FACE_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


class CheckpointLocation(NamedTuple):
    """Place of a model's weights on this machine, and what is known of them besides."""

    name: str
    path: Path
    """A weight file, or a Hugging Face folder."""
    head: Path | None = None
    """The file of a released linear classifier on top."""
    config: BackboneConfig | None = None
    """Architecture of a release, whose files do not state it."""


def locate_checkpoint(
    source: str | os.PathLike[str], *, layers: int = 4, progress: ShowProgress | None = None
) -> CheckpointLocation:
    """The files behind a model's name, fetched where necessary.

    A classifier's name (`dinov2_vits14_lc`) gets the head on `layers` blocks (1 or 4), as `torch.hub` gives it.
    `progress` is asked for a bar with the first byte that is fetched, and not at all for files that are here already.
    Raises `WeightsError` when there is no such model or it cannot be fetched, `UnknownRelease` with the nearest name.
    """
    text = str(source)
    if not text:
        raise WeightsError("no model was named; give a release's name, a weight file or a run's folder")
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of a user who does not exist
        raise WeightsError(f"{text[:200]} is no path that can be read ({_reason(error)}); check it") from error
    if exists:
        return _existing(path)
    if "://" in text:
        return CheckpointLocation(text.rpartition("/")[2] or text, download(text, progress=_FromFirstByte(progress)))
    if path.suffix in _WEIGHT_SUFFIXES or path.is_absolute() or text.startswith((".", "~")):
        raise WeightsError(f"there is no weight file {text}; check the path")
    if _HUGGING_FACE_ID.fullmatch(text):
        return CheckpointLocation(text, _hugging_face(text))
    return _release(release(text), text, layers, _FromFirstByte(progress))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _existing(path: Path) -> CheckpointLocation:
    if not path.is_dir():
        return CheckpointLocation(path.name, path)
    is_run = (path / "eval").is_dir() or (path / "config.yaml").exists()
    if not is_run and any((path / name).exists() for name in ("config.json", "model.safetensors")):
        return CheckpointLocation(path.name, path)
    from dinov2.checkpoints.runs import newest_teacher  # reads configurations, which a weight file does not need

    teacher = newest_teacher(path)
    return CheckpointLocation(f"{path.absolute().name}/{teacher.parent.name}", teacher)


def _release(row: Release, name: str, layers: int, progress: "_FromFirstByte") -> CheckpointLocation:
    if row.kind not in ("backbone", "classifier"):
        raise WeightsError(f"{row.name} is a {row.kind} head, which does not load as a model; give a backbone")
    if row.hub_name == name and row.kind == "classifier" and row.layers != layers:
        row = release(f"{row.backbone}_linear_head")
    backbone = release(row.backbone)
    config = backbone_config(backbone)
    path = download(backbone.url, sha256=backbone.sha256, progress=progress)
    if row is backbone:
        return CheckpointLocation(name, path, config=config)
    return CheckpointLocation(name, path, download(row.url, sha256=row.sha256, progress=progress), config)


class _FromFirstByte:
    """Progress of a download whose bar appears when there is something to show."""

    def __init__(self, progress: ShowProgress | None) -> None:
        self._progress = progress
        self._show: Callable[[int, int], None] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._show, self._progress = self._progress("downloading (bytes)"), None
        if self._show is not None:
            self._show(done, total)


def _hugging_face(identifier: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependency("huggingface_hub>=0.30", f"the model {identifier} of Hugging Face") from error
    try:
        return Path(snapshot_download(identifier, allow_patterns=_HUGGING_FACE_FILES))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"there is no file or folder {identifier}, and Hugging Face cannot be asked for a model of that name "
            "(no network?); check the path, or connect and try again"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsError(
            f"there is no file or folder {identifier}, and Hugging Face gives no model of that name "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); check the spelling"
        ) from error
