"""Features for all evaluations: extracted once per model, images and transform, kept on disk, shared.

An extractor is a loaded model, its untrained twin or raw pixels, as a function from images to columns. The columns of a
vision transformer are cut into parts, so that k-NN keeps nothing but the class token in memory while the linear probe,
which reads up to four blocks, comes from the same pass over the images:

    earlier [B, (n-1)*D]   class tokens of the n-1 blocks before the last, oldest first
    cls     [B, D]         class token of the last block
    mean    [B, D]         mean of its patch tokens

All are after the final norm; registers are never read. Of sets whose columns fit into memory together all parts are
kept; of larger sets only those that were asked for. Entries are found by content (`dinov2.encode.store.cache`):
weights, model, transform, precision, kind of device, and the images with their names, sizes, times and labels.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from dinov2 import distributed
from dinov2.apps.evaluation.datasets import LabelledDataset
from dinov2.apps.places import output_folder
from dinov2.checkpoints.download import cache_folder
from dinov2.checkpoints.files import state_digest
from dinov2.checkpoints.locate import ShowProgress
from dinov2.configs.checks import MOST_WORKERS, at_most
from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.external_models import ExternalModel
from dinov2.encode.store.cache import content_key, has_features, load_features, save_features
from dinov2.encode.stream import Features, extract_features
from dinov2.encode.tokens import Tokens, require_finite
from dinov2.errors import ConfigError, DataError
from dinov2.eval.scoring import Provenance
from dinov2.pretrained import Pretrained

__all__ = [
    "PARTS",
    "Extraction",
    "FeatureCache",
    "FeatureExtractor",
    "RawPixels",
    "cache_for",
    "display_name",
    "feature_extractor",
    "raw_pixels",
    "untrained_extractor",
    "with_size",
]

PARTS = ("earlier", "cls", "mean")
"""Parts in the order in which a linear classifier reads them."""

_BLOCKS = 4


@dataclass(frozen=True)
class FeatureExtractor:
    """A function from normalised images to columns, and everything that its features depend on."""

    name: str
    """Display name."""
    columns: Callable[[Tensor], Tensor]
    """Images `[B, C, H, W]` -> float32 `[B, W]`, the parts side by side."""
    parts: dict[str, int]
    """Width of each part in the order of the columns; 0 where it follows from the first batch (raw pixels)."""
    blocks: int
    """Blocks whose class tokens are among the columns."""
    described: Mapping[str, object]
    """The model in plain values, for result rows."""
    identity: Mapping[str, object]
    """The model in plain values, for cache keys."""
    transform: EvalTransform
    precision: str
    """Number format that products are computed in: `float32`, `bfloat16`, `float16`."""
    device: torch.device
    channels: int = 3

    def provenance(self, dataset: str, *, split: str = "") -> Provenance:
        """Fields of the rows of a result on a data set."""
        return {
            "dataset": dataset,
            "split": split,
            "model": self.described,
            "transform": self.transform.describe(),
            "precision": self.precision,
        }


def display_name(loaded: Pretrained) -> str:
    """The model's name; of a run's exported teacher, all of which have one file name, that of its folders."""
    path = Path(loaded.source)
    if loaded.name == path.name and path.parent.parent.name == "eval":
        return f"{path.absolute().parents[2].name}/{path.parent.name}"
    return loaded.name


def feature_extractor(loaded: Pretrained, *, name: str | None = None) -> FeatureExtractor:
    """The extractor of a loaded model."""
    blocks = _blocks_of(loaded)
    earlier = list(range(-blocks, -1))

    def columns(images: Tensor) -> Tensor:
        tokens = loaded.encode(images, layers=earlier)
        return torch.cat(list(_parts_of(tokens, earlier).values()), dim=1)

    probe = _probe(loaded)
    widths = {part: value.shape[1] for part, value in _parts_of(loaded.encode(probe, layers=earlier), earlier).items()}
    known = ("embed_dim", "depth", "patch_size", "num_register_tokens")
    architecture = {key: loaded.table[key] for key in known if key in loaded.table}
    identity: dict[str, object] = {"weights": loaded.digest, "model": _plain(loaded.table)}
    if isinstance(loaded.backbone, ExternalModel):
        # The code of another library or of the user may change while the weights stay: what it computes tells.
        identity |= {"name": loaded.source, "probe": _rounded(columns(probe))}
    return FeatureExtractor(
        name=name or display_name(loaded),
        columns=columns,
        parts=widths,
        blocks=blocks,
        described={"name": loaded.name, "sha256": loaded.digest, **architecture},
        identity=identity,
        transform=loaded.transform,
        precision=str(loaded.autocast_dtype or torch.float32).removeprefix("torch."),
        device=loaded.device,
        channels=loaded.in_chans,
    )


def untrained_extractor(loaded: Pretrained) -> FeatureExtractor:
    """The same architecture with fresh weights. Raises `ConfigError` for models of other libraries."""
    backbone = loaded.untrained()
    digest = state_digest(backbone.state_dict())
    twin = replace(loaded, backbone=backbone, digest=digest, head=None, name="untrained backbone").to(loaded.device)
    extractor = feature_extractor(twin, name="untrained")
    described = {key: value for key, value in extractor.described.items() if key != "sha256"}
    return replace(extractor, described=described)


def raw_pixels(loaded: Pretrained) -> FeatureExtractor:
    """The images themselves, through the model's transform."""
    pixels = RawPixels()
    return FeatureExtractor(
        name="raw pixels",
        columns=pixels,
        parts={"cls": 0},
        blocks=1,
        described={"name": "raw normalised pixels"},
        identity={"weights": "raw pixels", "max_size": pixels.max_size},
        transform=loaded.transform,
        precision="float32",
        device=loaded.device,
        channels=loaded.in_chans,
    )


class RawPixels(nn.Module):
    """Normalised images [B, C, H, W] to L2-normalised pixels [B, C*h*w].

    Images whose longer side exceeds `max_size` are shrunk to it first, antialiased, which bounds the memory. The
    channel normalisation is that of the transform before: cosine similarity needs pixels centred about zero, or
    brightness decides alone (36 instead of 45 % on the same images).
    """

    def __init__(self, *, max_size: int = 32) -> None:
        super().__init__()
        self.max_size = max_size

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        height, width = images.shape[-2:]
        shrink = self.max_size / max(height, width)
        if shrink < 1:
            size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
            images = interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return normalize(images.flatten(1), dim=1)


def with_size(loaded: Pretrained, *, resolution: int | None = None, resize: int | None = None) -> Pretrained:
    """The model with images of another size: `resolution` is the side of the crop, `resize` the shorter side before it.

    Raises `ConfigError` when the crop is no multiple of the patch size, or larger than the resized image.
    """
    if resolution is None and resize is None:
        return loaded
    crop = resolution or loaded.transform.crop_size
    if crop % loaded.patch_size:
        down, up = crop // loaded.patch_size * loaded.patch_size, -(-crop // loaded.patch_size) * loaded.patch_size
        nearest = f"{down} or {up}" if down else str(up)
        raise ConfigError(
            f"a resolution of {crop} pixels is no multiple of the patch size {loaded.patch_size}; use {nearest}"
        )
    if resize is not None and resize < crop:
        raise ConfigError(f"images resized to {resize} pixels hold no crop of {crop}; use a --resize of {crop} or more")
    loaded.transform = loaded.transform.with_(crop_size=crop, resize_size=resize)
    return loaded


def _blocks_of(loaded: Pretrained) -> int:
    """Blocks that a linear classifier may read: 4, or all of a shallower model; 1 where a model shows no others."""
    depth = loaded.table.get("depth")
    wanted = min(_BLOCKS, int(depth)) if depth else _BLOCKS
    if not isinstance(loaded.backbone, ExternalModel):
        return wanted
    if not depth:
        return 1
    try:
        loaded.encode(_probe(loaded), layers=list(range(-wanted, -1)))
    except ConfigError:
        return 1
    return wanted


def _probe(loaded: Pretrained) -> Tensor:
    """Two images that are the same on every machine, of the size that the model is evaluated at."""
    shape = (2, loaded.in_chans, loaded.transform.crop_size, loaded.transform.crop_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _parts_of(tokens: Tokens, earlier: list[int]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    if earlier:
        parts["earlier"] = torch.cat([tokens.layers[index].cls for index in earlier], dim=1)
    parts["cls"] = tokens.cls
    if tokens.patches.shape[1] * tokens.patches.shape[2]:
        parts["mean"] = tokens.patches.flatten(1, 2).mean(dim=1)
    return parts


def _rounded(columns: Tensor) -> str:
    """A digest of three significant digits: enough to notice another computation, few enough to ignore the last bit."""
    scale = columns.float().abs().amax().clamp_min(1e-12)
    return state_digest({"probe": (columns.float() / scale * 500).round().to(torch.int16).cpu()})


def _plain(table: Mapping[str, object]) -> dict[str, object]:
    plain = (str, int, float, bool)
    return {str(key): value if isinstance(value, plain) else str(value) for key, value in table.items()}


_CACHE_NAME = "features"
"""Folder below the cache of downloads (`$DINOV2_CACHE`)."""

_ALL_PARTS_BYTES = 2**30  # twice that is needed while they are taken apart

_LOG = logging.getLogger("dinov2")


@dataclass(frozen=True)
class Extraction:
    """How features were obtained."""

    seconds: float
    """Of this process, for decoding and the model, or for reading what was kept."""
    images: int
    from_cache: bool


def cache_for(folder: str | os.PathLike[str] | None, *, use: bool = True) -> Path | None:
    """The folder that features are kept in: the one given, else the default; None when none is wanted.

    Raises `ConfigError` when nothing can be written to the folder that was given.
    """
    if not use:
        return None
    if not folder:
        return cache_folder() / _CACHE_NAME
    try:
        return output_folder(folder, task=_CACHE_NAME)
    except ConfigError as error:
        raise ConfigError(f"{error}; this was the --cache-dir, and --no-cache keeps nothing") from error


@dataclass
class FeatureCache:
    """Source of features for evaluations; it remembers what this process has read or extracted."""

    cache: Path | None
    batch_size: int = 256
    num_workers: int = 0
    progress: ShowProgress = lambda label: None
    extractions: dict[str, Extraction] = field(default_factory=dict)
    """By data set, of the extractor that came last."""
    _kept: dict[str, Features] = field(default_factory=dict, repr=False)
    """By content key."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"the batch is {self.batch_size}; write 1 or more")
        if self.num_workers < 0:
            raise ConfigError(f"the number of workers is {self.num_workers}; write 0 to load in this process")
        at_most("the number of workers", self.num_workers, MOST_WORKERS)

    def features(
        self, extractor: FeatureExtractor, images: LabelledDataset, *, parts: Sequence[str] = ("cls",)
    ) -> Features:
        """Features `[S, D of the parts]` of all readable images, with labels, classes and rules of scoring.

        Over several processes all call and all get the same. Raises `ConfigError` for a part that the extractor
        does not have, `DataError` when features are not finite.
        """
        wanted = [part for part in PARTS if part in parts]
        if missing := [part for part in wanted if part not in extractor.parts]:
            raise ConfigError(
                f"{extractor.name} shows no {' and no '.join(_WORDS[part] for part in missing)}; evaluate it by k-NN "
                "or logistic regression"
            )
        identity = images.identity()
        keys = {part: content_key(_key(extractor, identity, part)) for part in wanted}
        if any(key not in self._kept for key in keys.values()):
            started = time.perf_counter()
            read = self._read(extractor, identity, wanted)
            found = read or self._extracted(extractor, images, identity, wanted)
            self.extractions[images.name] = Extraction(
                time.perf_counter() - started, len(next(iter(found.values()))), from_cache=read is not None
            )
            self._kept |= {content_key(_key(extractor, identity, part)): one for part, one in found.items()}
        return images.with_rules(_side_by_side([self._kept[keys[part]] for part in wanted]))

    def is_kept(self, extractor: FeatureExtractor, images: LabelledDataset, *, parts: Sequence[str] = ("cls",)) -> bool:
        """Whether `features` would find everything on the disk; only the manifests are looked at."""
        if self.cache is None:
            return False
        identity = images.identity()
        return all(has_features(self.cache, _key(extractor, identity, part)) for part in parts)

    def forget(self) -> None:
        """Frees the memory; what lies on the disk stays."""
        self._kept.clear()
        self.extractions = {}

    def _read(
        self, extractor: FeatureExtractor, identity: Mapping[str, Any], wanted: Sequence[str]
    ) -> dict[str, Any] | None:
        """Features on disk, when all processes find all of them; a damaged entry counts as none."""
        found: dict[str, Any] = {}
        if self.cache is not None:
            try:
                found = {
                    part: load_features(self.cache, parts=_key(extractor, identity, part), column=part)
                    for part in wanted
                }
            except DataError:
                found = {}
        lacking = not found or any(one is None for one in found.values())
        return None if bool(distributed.all_reduce_max(torch.tensor([int(lacking)]))) else found

    def _extracted(
        self, extractor: FeatureExtractor, images: LabelledDataset, identity: Mapping[str, Any], wanted: Sequence[str]
    ) -> dict[str, Any]:
        n_bytes = 4 * len(images.images) * sum(extractor.parts.values())
        kept = list(extractor.parts) if n_bytes <= _ALL_PARTS_BYTES else list(wanted)
        slices = _slices(extractor.parts)

        def columns(batch: Tensor) -> Tensor:
            output = extractor.columns(batch)
            return output if len(kept) == len(slices) else torch.cat([output[:, slices[part]] for part in kept], dim=1)

        everything = extract_features(
            columns,
            images.images,
            transform=extractor.transform,
            channels=extractor.channels,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=extractor.device,
            progress=self.progress(f"{extractor.name}: features of {images.name}"),
        )
        require_finite(everything.features, model=extractor.name, of=f"images of {images.name}")
        columns_of = _slices({part: extractor.parts[part] for part in kept})
        found = {
            part: replace(everything, features=everything.features[:, columns_of[part]].contiguous()) for part in kept
        }
        if self.cache is not None and distributed.is_main_process():
            for part, features in found.items():
                self._save(extractor, images, features, part)
        distributed.barrier()
        return found

    def _save(self, extractor: FeatureExtractor, images: LabelledDataset, features: Features, part: str) -> None:
        assert self.cache is not None
        key, transform = _key(extractor, images.identity(), part), extractor.transform
        request = {
            "source": {"images": len(images.images), "fingerprint": key["dataset"]["images"]},
            "model": extractor.described,
            "transform": {**transform.describe(), "fit": transform.fit, "size": transform.crop_size},
            "precision": extractor.precision,
        }
        about = {"request": request, "source": images.name, "root": getattr(images.images, "root", None)}
        try:
            save_features(self.cache, features, parts=key, column=part, about=about)
        except OSError as error:  # a full disk must not cost the hours that the features took
            _LOG.warning("features are not kept in %s: %s", self.cache, error.strerror or error)


_WORDS = {"earlier": "earlier blocks", "cls": "class token", "mean": "patch tokens"}


def _key(extractor: FeatureExtractor, images: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {
        "model": extractor.identity,
        "part": part,
        "blocks": extractor.blocks if part == "earlier" else None,
        "transform": extractor.transform.describe(),
        "channels": extractor.channels,
        "precision": extractor.precision,
        "device": extractor.device.type,
        "dataset": dict(images),
    }


def _slices(widths: Mapping[str, int]) -> dict[str, slice]:
    """Columns of each part; a width of 0 is all that there is."""
    if list(widths.values()) == [0]:
        return dict.fromkeys(widths, slice(None))
    slices, first = {}, 0
    for part, width in widths.items():
        slices[part] = slice(first, first + width)
        first += width
    return slices


def _side_by_side(parts: Sequence[Features]) -> Features:
    if len(parts) == 1:
        return parts[0]
    return replace(parts[0], features=torch.cat([part.features for part in parts], dim=1))
