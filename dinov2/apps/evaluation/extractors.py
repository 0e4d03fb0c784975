"""Feature extractors: a loaded model, its untrained twin or raw pixels, as a function from images to columns.

The columns of a vision transformer are cut into parts, so that k-NN keeps nothing but the class token in memory while
the linear probe, which reads up to four blocks, comes from the same pass over the images:

    earlier [B, (n-1)*D]   class tokens of the n-1 blocks before the last, oldest first
    cls     [B, D]         class token of the last block
    mean    [B, D]         mean of its patch tokens

All are after the model's final norm; registers are never read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from dinov2.checkpoints.files import state_digest
from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.external_models import ExternalModel
from dinov2.encode.tokens import Tokens
from dinov2.errors import ConfigError
from dinov2.eval.scoring import Provenance
from dinov2.pretrained import Pretrained

__all__ = [
    "PARTS",
    "FeatureExtractor",
    "RawPixels",
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
