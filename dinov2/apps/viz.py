"""What a model sees in images: maps of its patches as pictures, and one page to click on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dinov2.analysis.patch_maps import high_norm_share
from dinov2.analysis.pca import load_pca, save_pca
from dinov2.apps.places import output_folder
from dinov2.apps.viewing.models import check_model, described
from dinov2.apps.viewing.scenes import Scene, look_at, share_of_point
from dinov2.checkpoints.locate import ShowProgress
from dinov2.encode.image_inputs import find_frames
from dinov2.errors import ConfigError
from dinov2.file_lock import exclusive
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import Pretrained, load
from dinov2.report.viz_data import PageImage, PageMatches, PageModel
from dinov2.report.viz_files import found_matches, write_pictures
from dinov2.report.viz_page import MOST_IMAGES, WrittenPage, write_viz_page
from dinov2.whole_files import write_json

__all__ = ["MAPS", "MOST_FRAMES", "VizReport", "viz"]

MAPS = ("pca", "attention", "similarity", "norm", "matches")
"""Kinds of pictures."""
MOST_FRAMES = 512
"""Images at once: their features are kept in memory, and their basis is common."""


@dataclass
class VizReport:
    """What was written and measured."""

    output_dir: Path
    files: list[Path] = field(default_factory=list)
    page: WrittenPage | None = None
    basis: Path | None = None
    basis_reused: bool = False
    model_names: list[str] = field(default_factory=list)
    norm_thresholds: list[float] = field(default_factory=list)
    """By model."""
    high_norm_shares: list[float] = field(default_factory=list)
    """Share of all patches of all images, by model."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of images that were left out."""
    notes: list[str] = field(default_factory=list)
    """What a user should know: what was left out, what was reused."""


def viz(
    images: Sequence[str | os.PathLike[str]],
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    what: Sequence[str] = (),
    size: int | None = None,
    block: int = -1,
    point: tuple[float, float] | None = None,
    basis: str | os.PathLike[str] | None = None,
    foreground: bool = False,
    compare: str | os.PathLike[str] | None = None,
    gif: bool = False,
    page: bool = True,
    norm_threshold: float | None = None,
    max_tokens: int = 4096,
    stride: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: ShowProgress = lambda label: None,
) -> VizReport:
    """Draws what a model (and perhaps another one beside it) sees in images, into the folder `output`.

    Args:
        images: files, folders, files of several frames; all share one PCA basis.
        what: some of `MAPS`; empty stands for all that apply.
        size: pixels of the shorter side; the longer one follows, and both become multiples of the patch. None is 32
            patches.
        block: whose features and attention are shown, from 0, or from the end.
        point: x and y in pixels of the first image; its patch is what similarities are measured to. None is the centre.
        basis: a file with the PCA basis: reused when it exists, else written.
        foreground: fit the colours on the foreground alone, and fade the background.
        gif: write moving pictures instead of one file an image.
        norm_threshold: what counts as a patch of high norm; None is twice the median.
        max_tokens: patches of one image; a larger one is shown smaller.
        stride: pixels between patches; None is the patch size, less gives finer maps.

    Raises:
        DataError: not one of the images can be read, or `basis` is no basis.
        ConfigError: an argument cannot be used, with this model or at all.
    """
    maps = _checked_maps(what, size)
    folder = output_folder(output, task="viz")
    frames = find_frames(images)
    if len(frames) > MOST_FRAMES:
        raise ConfigError(f"{len(frames)} images were given, at most {MOST_FRAMES} are shown at once; take a part")
    colours = None if basis is None else Path(basis).expanduser()
    kept = load_pca(colours) if colours is not None and colours.exists() else None
    sources = [source for source in (model, compare) if source is not None]
    loaded = [load(source, device=device, precision=precision, stride=stride, progress=progress) for source in sources]
    report = VizReport(folder)
    maps = _possible_maps(maps, loaded, len(frames), asked=bool(what), notes=report.notes)
    for one in loaded:
        check_model(one, size, block)

    scenes, report.unreadable = look_at(
        frames, loaded, size=size, block=block, point=point, max_tokens=max_tokens, show=progress("images")
    )
    if report.unreadable:
        first = report.unreadable[0][1]
        report.notes.append(f"{len(report.unreadable)} of {len(frames)} images were left out, the first: {first}")
    shown = [PageImage(scene.name, scene.shown, tuple(scene.views)) for scene in scenes]
    models, notes = described(
        loaded, shown, block=block, kept=kept, foreground=foreground, norm_threshold=norm_threshold
    )
    report.notes += notes
    report.basis_reused = kept is not None
    for m, drawn in enumerate(models):
        norms = torch.cat([scene.views[m].norms.flatten() for scene in scenes])
        report.model_names.append(drawn.name)
        report.norm_thresholds.append(drawn.norm_threshold)
        report.high_norm_shares.append(high_norm_share(norms, drawn.norm_threshold))

    with exclusive(folder, "viz"):
        report.basis = colours or folder / "basis.safetensors"
        if kept is None:
            report.basis.parent.mkdir(parents=True, exist_ok=True)
            save_pca(report.basis, models[0].basis)
        place = share_of_point(point, scenes[0].size)
        matches = found_matches(shown, models) if page or "matches" in maps else []
        drawn_pairs = matches if "matches" in maps else []
        report.files = write_pictures(
            folder, shown, models, maps, place=place, has_point=point is not None, matches=drawn_pairs, moving=gif
        )
        if page:
            report.page = _write_page(folder, shown, models, place, matches, report.notes)
        write_json(folder / "viz.json", _as_json(report, loaded, scenes, models, matches, block))
    return report


def _checked_maps(what: Sequence[str], size: int | None) -> list[str]:
    if wrong := [name for name in what if name not in MAPS]:
        raise ConfigError(f"there are no pictures called {wrong[0]!r}; choose from {', '.join(MAPS)}")
    if size is not None and size < 1:
        raise ConfigError(f"images cannot be {size} pixels large; write a positive number")
    return [name for name in MAPS if not what or name in what]


def _possible_maps(
    maps: list[str], loaded: Sequence[Pretrained], n_images: int, *, asked: bool, notes: list[str]
) -> list[str]:
    """What of the maps these models and images allow: a refusal when asked for by name, else a note."""
    if "attention" in maps:
        for one in loaded:
            if not isinstance(one.backbone, DinoVisionTransformer):
                sentence = f"{one.name} is a model of another library, whose queries and keys are not shown"
                if asked:
                    raise ConfigError(f"{sentence}; leave attention out of --what")
                notes.append(f"{sentence}: its attention is left out")
    if "matches" in maps and n_images < 2:
        if asked:
            raise ConfigError("matches need two images, one was given; give another or leave matches out of --what")
        maps = [name for name in maps if name != "matches"]
    return maps


def _write_page(
    folder: Path,
    images: Sequence[PageImage],
    models: Sequence[PageModel],
    place: tuple[float, float],
    matches: Sequence[PageMatches],
    notes: Sequence[str],
) -> WrittenPage:
    """The page, of some images at even distances where there are too many."""
    n = min(len(images), MOST_IMAGES)
    chosen = [round(i * (len(images) - 1) / max(n - 1, 1)) for i in range(n)]
    pairs = [
        replace(pair, first=chosen.index(pair.first), second=chosen.index(pair.second))
        for pair in matches
        if pair.first in chosen and pair.second in chosen
    ]
    some = [f"{n} of {len(images)} images are shown, at even distances."] if n < len(images) else []
    return write_viz_page(
        folder / "index.html",
        models=models,
        images=[images[i] for i in chosen],
        start=place,
        matches=pairs,
        notes=[*some, *(f"Note: {note}." for note in notes)],
    )


def _as_json(
    report: VizReport,
    loaded: Sequence[Pretrained],
    scenes: Sequence[Scene],
    models: Sequence[PageModel],
    matches: Sequence[PageMatches],
    block: int,
) -> dict[str, Any]:
    """Everything that was measured, in plain values."""
    return {
        "models": [
            {
                "name": model.name,
                "source": one.source,
                "sha256": one.digest,
                "block": block,
                "patch_size": one.patch_size,
                "stride": one.stride,
                "pca_explained": model.basis.explained.tolist(),
                "norms": model.norm_kind,
                "high_norm_threshold": model.norm_threshold,
                "high_norm_share": share,
            }
            for one, model, share in zip(loaded, models, report.high_norm_shares, strict=True)
        ],
        "images": [
            {
                "name": scene.name,
                "size": list(scene.size),
                "views": [
                    {
                        "grid": list(view.grid),
                        "high_norm_share": high_norm_share(view.norms, model.norm_threshold),
                        "attention_of_cls": None
                        if view.shares is None
                        else dict(zip(("cls", "registers", "patches"), view.shares, strict=True)),
                    }
                    for view, model in zip(scene.views, models, strict=True)
                ],
            }
            for scene in scenes
        ],
        "matches": [
            {
                "first": scenes[pair.first].name,
                "second": scenes[pair.second].name,
                "model": models[pair.model].name,
                "pairs": len(pair.matches.similarity),
            }
            for pair in matches
        ],
        "basis": None if report.basis is None else str(report.basis),
        "files": [path.name for path in report.files],
        "page": None if report.page is None else {"file": report.page.path.name, "bytes": report.page.n_bytes},
        "unreadable": [{"path": path, "reason": reason} for path, reason in report.unreadable],
        "notes": report.notes,
    }
