"""Features for all evaluations: extracted once per model, images and transform, kept on disk, shared.

A pass over the images gives every part of the columns (`dinov2.apps.evaluation.extractors`). Of sets whose columns fit
into memory together all parts are kept, so that a later evaluation of another kind decodes nothing; of larger sets only
those that were asked for. Entries are found by content (`dinov2.encode.store.cache`): weights, model, transform,
precision, kind of device, and the images with their names, sizes, times and labels.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.apps.evaluation.datasets import LabelledDataset
from dinov2.apps.evaluation.extractors import PARTS, FeatureExtractor
from dinov2.apps.places import output_folder
from dinov2.checkpoints.download import cache_folder
from dinov2.checkpoints.locate import ShowProgress
from dinov2.configs.checks import MOST_WORKERS, at_most
from dinov2.encode.store.cache import content_key, has_features, load_features, save_features
from dinov2.encode.stream import Features, extract_features
from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError

__all__ = ["Extraction", "FeatureCache", "cache_for"]

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
