"""Every weight file of the public DINOv2 release, one row each: 8 backbones and 57 heads.

The rows are made from a few rules and tables of figures, and everything that speaks of a release (`torch.hub` entries,
`dinov2 releases`, the tables of the documentation, the tests) reads them here. Plain values; nothing is imported or
fetched. The release published no checksums, and none are made up: `sha256` stays None until someone has hashed the
published file.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dinov2.errors import UnknownRelease

if TYPE_CHECKING:
    from dinov2.models.config import BackboneConfig

__all__ = [
    "BASE_URL",
    "KINDS",
    "METRICS",
    "RELEASES",
    "Kind",
    "Metric",
    "Release",
    "Reported",
    "backbone_config",
    "release",
]

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
"""The folder below which all files lie."""

Kind = Literal["backbone", "classifier", "depth", "segmentation", "mask2former"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of files, in the order of the table."""


class Metric(NamedTuple):
    """Metric of a reported figure."""

    title: str
    unit: str
    digits: int
    """Digits behind the point that the authors give."""
    higher_is_better: bool = True


METRICS = {
    "imagenet_knn": Metric("ImageNet-1k k-NN top-1", "%", 1),
    "imagenet_linear": Metric("ImageNet-1k linear top-1", "%", 1),
    "imagenet_v2_linear": Metric("ImageNet-V2 linear top-1", "%", 1),
    "inaturalist18_linear": Metric("iNaturalist 2018 linear top-1", "%", 1),
    "oxford_hard_map": Metric("Oxford-Hard mAP", "%", 1),
    "nyu_rmse": Metric("NYUd RMSE", "m", 3, False),
    "sun_rmse": Metric("SUN RGB-D RMSE, trained on NYUd", "m", 3, False),
    "kitti_rmse": Metric("KITTI RMSE", "m", 2, False),
    "ade20k_miou": Metric("ADE20K mIoU", "%", 1),
    "voc2012_miou": Metric("Pascal VOC 2012 mIoU", "%", 1),
}
"""The metrics of `Reported`, by name."""


class Reported(NamedTuple):
    """A figure that the authors published; `source` says where, because their own tables do not always agree."""

    metric: str
    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published file. What describes the network is, in the row of a head, that of the backbone below it."""

    name: str
    """Name in this package; for backbones that of the `torch.hub` entry."""
    kind: Kind
    backbone: str
    """Name of the backbone's row; for a backbone its own."""
    arch: str
    """A key of `dinov2.models.vision_transformer.ARCHITECTURES`."""
    layers: int | None = None
    """Blocks that a head reads; None for backbones and for Mask2Former, which reads the whole network."""
    dataset: str
    """Training data of the file; not of a head's backbone."""
    num_register_tokens: int
    img_size: int = 518
    """Side in pixels of the images that the position embeddings were made for."""
    patch_size: int = 14
    ffn_layer: str
    interpolate_offset: float
    interpolate_antialias: bool
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    url: str
    hf_id: str | None = None
    """The repository on Hugging Face with the same weights; for 1-layer classifiers together with their backbone."""
    timm_name: str | None = None
    """Name of the same weights in timm."""
    licence: str = "Apache-2.0"
    parameters: int | None = None
    """Number of parameters of a backbone."""
    accuracy: tuple[Reported, ...] = ()
    sha256: str | None = None
    """SHA-256 of the file; None where it is not known."""

    @property
    def filename(self) -> str:
        """Last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def hub_name(self) -> str | None:
        """The entry of `torch.hub` that loads the file; None for files without one."""
        if self.kind == "backbone":
            return self.name
        return f"{self.backbone}_lc" if self.kind == "classifier" else None

    def reported(self, metric: str) -> float | None:
        """The reported figure of a metric; None when the authors gave none."""
        return next((fact.value for fact in self.accuracy if fact.metric == metric), None)

    def shown(self, metric: str) -> str:
        """The figure with the digits that the authors give; a dash when there is none."""
        value = self.reported(metric)
        return "-" if value is None else f"{value:.{METRICS[metric].digits}f}"


def release(name: str) -> Release:
    """The row with this name, Hugging Face id, URL or file name (with or without `.pth`), or `torch.hub` entry.

    A classifier's entry (`dinov2_vits14_lc`) is its 4-layer head, the default there. Raises `UnknownRelease` with the
    nearest name.
    """
    aliases = _aliases()
    if (row := aliases.get(name) or aliases.get(name.lower())) is not None:
        return row
    near = difflib.get_close_matches(name, aliases, n=1, cutoff=0.0)[0]
    raise UnknownRelease(
        f"no release is called {name!r}; the nearest is {near!r}. `dinov2 releases` lists all {len(RELEASES)}. "
        "The path of a weight file of your own works as well."
    )


def backbone_config(row: Release) -> "BackboneConfig":
    """The architecture of a release's backbone, whose file holds no `model` table."""
    from dinov2.models.config import BackboneConfig
    from dinov2.models.vision_transformer import ARCHITECTURES

    return BackboneConfig(
        img_size=(row.img_size, row.img_size),
        patch_size=row.patch_size,
        in_chans=3,
        **ARCHITECTURES[row.arch]._asdict(),
        mlp_ratio=4.0,
        ffn_layer=row.ffn_layer,
        qkv_bias=True,
        proj_bias=True,
        ffn_bias=True,
        layerscale=True,
        num_register_tokens=row.num_register_tokens,
        interpolate_offset=row.interpolate_offset,
        interpolate_antialias=row.interpolate_antialias,
        mean=row.mean,
        std=row.std,
    )


@cache
def _aliases() -> dict[str, Release]:
    found: dict[str, Release] = {}
    for row in RELEASES:
        names = [row.name, row.hf_id, row.url, row.filename, row.filename.removesuffix(".pth")]
        if row.kind == "classifier" and row.layers == 4:
            names.append(row.hub_name)
        found.update(dict.fromkeys(filter(None, names), row))
    return found


class _Size(NamedTuple):
    letter: str
    arch: str
    word: str
    """Name of the size at Hugging Face and timm."""
    parameters: int
    """Without registers."""
    width: int


_SIZES = (
    _Size("s", "vit_small", "small", 22_056_576, 384),
    _Size("b", "vit_base", "base", 86_580_480, 768),
    _Size("l", "vit_large", "large", 304_368_640, 1024),
    _Size("g", "vit_giant2", "giant", 1_136_480_768, 1536),
)

_MODEL_CARD, _README_MODELS, _README_EVALUATION = "model card", "README, table of models", "README, table of evaluation"
_PAPER = "arXiv 2304.07193"

# By size and registers: k-NN, linear (README, table of models), linear (README, table of the files to evaluate with).
_IMAGENET = {
    "s": ((79.0, 81.1, 81.1), (79.1, 80.9, 80.8)),
    "b": ((82.1, 84.5, 84.5), (82.0, 84.6, 84.4)),
    "l": ((83.5, 86.3, 86.3), (83.8, 86.7, 86.5)),
    "g": ((83.5, 86.5, 86.5), (83.7, 87.1, 87.0)),
}

# By size and registers: ImageNet-V2, iNaturalist 2018, Oxford-Hard.
_CARD = {
    "s": ((70.8, 69.5, 43.2), (71.0, 67.6, 39.5)),
    "b": ((74.9, 76.3, 49.5), (75.6, 73.8, 51.0)),
    "l": ((77.6, 79.8, 54.0), (78.5, 80.9, 55.7)),
    "g": ((78.4, 81.6, 52.3), (78.8, 81.5, 58.2)),
}

# RMSE by size for linear, linear4 and dpt: NYUd, KITTI, NYUd -> SUN RGB-D.
_DEPTH = {
    "s": ((0.449, 0.417, 0.356), (3.10, 2.86, 2.34), (0.477, 0.431, 0.409)),
    "b": ((0.399, 0.362, 0.317), (2.90, 2.59, 2.23), (0.448, 0.400, 0.377)),
    "l": ((0.384, 0.333, 0.293), (2.78, 2.50, 2.14), (0.429, 0.396, 0.360)),
    "g": ((0.344, 0.298, 0.279), (2.62, 2.35, 2.11), (0.402, 0.362, 0.338)),
}

# mIoU by size for linear and ms (several scales and layers): ADE20K, Pascal VOC 2012.
_SEGMENTATION = {
    "s": ((44.3, 47.2), (81.1, 82.6)),
    "b": ((47.3, 51.3), (82.5, 84.9)),
    "l": ((47.7, 53.1), (82.1, 86.0)),
    "g": ((49.0, 53.0), (83.0, 86.2)),
}


def _rows() -> Iterator[Release]:
    yield from (_backbone(size, registers) for registers in (0, 4) for size in _SIZES)
    yield from (_classifier(size, registers, n) for registers in (0, 4) for size in _SIZES for n in (1, 4))
    for dataset in ("nyu", "kitti"):
        yield from (_depth(size, dataset, head) for size in _SIZES for head in ("linear", "linear4", "dpt"))
    for dataset in ("ade20k", "voc2012"):
        yield from (_segmentation(size, dataset, head) for size in _SIZES for head in ("linear", "ms"))
    yield _row(
        "_ade20k_m2f",
        size=_SIZES[-1],
        kind="mask2former",
        dataset="ADE20K",
        accuracy=(Reported("ade20k_miou", 60.2, _PAPER),),
    )


def _row(suffix: str, *, size: _Size, kind: Kind, registers: int = 0, **rest: Any) -> Release:
    folder = f"dinov2_vit{size.letter}14"  # of models with registers too
    backbone = f"{folder}_reg" if registers else folder
    stem = f"{folder}_reg{registers}" if registers else folder
    return Release(
        name=backbone if kind == "backbone" else f"{backbone}{suffix}",
        kind=kind,
        backbone=backbone,
        arch=size.arch,
        num_register_tokens=registers,
        ffn_layer="swiglufused" if size.letter == "g" else "mlp",
        # The position rule belongs to the weights: the other one changes features without a word.
        interpolate_offset=0.0 if registers else 0.1,
        interpolate_antialias=bool(registers),
        url=f"{BASE_URL}/{folder}/{stem}{suffix}.pth",
        **rest,
    )


def _hugging_face(size: _Size, registers: int) -> str:
    return f"facebook/dinov2-{'with-registers-' if registers else ''}{size.word}"


def _backbone(size: _Size, registers: int) -> Release:
    knn, linear, _ = _IMAGENET[size.letter][bool(registers)]
    v2, inaturalist, oxford = _CARD[size.letter][bool(registers)]
    return _row(
        "_pretrain",
        size=size,
        kind="backbone",
        registers=registers,
        dataset="LVD-142M",
        hf_id=_hugging_face(size, registers),
        timm_name=f"vit_{size.word}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
        parameters=size.parameters + registers * size.width,
        accuracy=(
            Reported("imagenet_knn", knn, _README_MODELS),
            Reported("imagenet_linear", linear, _README_MODELS),
            Reported("imagenet_v2_linear", v2, _MODEL_CARD),
            Reported("inaturalist18_linear", inaturalist, _MODEL_CARD),
            Reported("oxford_hard_map", oxford, _MODEL_CARD),
        ),
    )


def _classifier(size: _Size, registers: int, layers: int) -> Release:
    linear = _IMAGENET[size.letter][bool(registers)][2]
    return _row(
        "_linear4_head" if layers == 4 else "_linear_head",
        size=size,
        kind="classifier",
        registers=registers,
        layers=layers,
        dataset="ImageNet-1k",
        hf_id=f"{_hugging_face(size, registers)}-imagenet1k-1-layer" if layers == 1 else None,
        accuracy=(Reported("imagenet_linear", linear, _README_EVALUATION),) if layers == 1 else (),
    )


def _depth(size: _Size, dataset: str, head: str) -> Release:
    column = ("linear", "linear4", "dpt").index(head)
    nyu, kitti, sun = (figures[column] for figures in _DEPTH[size.letter])
    facts = (Reported("nyu_rmse", nyu, _PAPER), Reported("sun_rmse", sun, _PAPER))
    return _row(
        f"_{dataset}_{head}_head",
        size=size,
        kind="depth",
        layers=1 if head == "linear" else 4,
        dataset={"nyu": "NYUd", "kitti": "KITTI"}[dataset],
        accuracy=facts if dataset == "nyu" else (Reported("kitti_rmse", kitti, _PAPER),),
    )


def _segmentation(size: _Size, dataset: str, head: str) -> Release:
    names = ("ade20k", "voc2012")
    value = _SEGMENTATION[size.letter][names.index(dataset)][("linear", "ms").index(head)]
    return _row(
        f"_{dataset}_{head}_head",
        size=size,
        kind="segmentation",
        layers=1 if head == "linear" else 4,
        dataset={"ade20k": "ADE20K", "voc2012": "Pascal VOC 2012"}[dataset],
        accuracy=(Reported(f"{dataset}_miou", value, _PAPER),),
    )


RELEASES: tuple[Release, ...] = tuple(_rows())
"""All rows: backbones, classifiers, depth, segmentation, Mask2Former."""
