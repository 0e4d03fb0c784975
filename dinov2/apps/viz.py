"""Maps of the patches of images by one model or two, as picture files and as a page to click on."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.analysis.attention_maps import block_number, look_into_block, patch_token
from dinov2.analysis.patch_maps import PatchView, high_norm_share, high_norm_threshold, patch_at, patch_norms
from dinov2.analysis.pca import PcaBasis, fit_foreground_pca, fit_image_pca, load_pca, match_colours, save_pca
from dinov2.apps.places import output_folder
from dinov2.checkpoints.locate import ShowProgress
from dinov2.encode.image_inputs import Frame, find_frames, open_frames
from dinov2.encode.tokens import require_finite
from dinov2.engine.parallel import autocast
from dinov2.errors import ConfigError, DataError, DinoError
from dinov2.file_lock import lock_folder
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import Pretrained, load
from dinov2.report.map_pictures import display_size
from dinov2.report.patch_page import MOST_IMAGES, PageImage, PageMatches, PageModel, WrittenPage, write_patch_page
from dinov2.report.patch_pictures import match_images, write_pictures
from dinov2.report.render import require_templates
from dinov2.whole_files import write_json

__all__ = ["VizReport", "view_patches", "viz"]

_MAPS = ("pca", "attention", "similarity", "norm", "matches")
_MOST_IMAGES = 512  # their features are kept in memory, and their basis is common
_PATCHES_ALONG = 32
_MOST_IN_FLOAT32 = 32  # features of more images are kept in half precision


@dataclass
class VizReport:
    """The files that were written, and what was measured."""

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
    """Sentences for the user: what was left out, what was reused."""


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
    """Draw maps of the patches of images by a model, or by two side by side, into the folder `output`.

    Args:
        images: files, folders, files of several frames; all share one PCA basis.
        what: some of pca, attention, similarity, norm, matches; empty stands for all that apply.
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
    if page:
        require_templates()
    folder = output_folder(output, task="viz")
    frames = find_frames(images)
    if len(frames) > _MOST_IMAGES:
        raise ConfigError(f"{len(frames)} images were given, at most {_MOST_IMAGES} are shown at once; take a part")
    colours = None if basis is None else Path(basis).expanduser()
    reused = load_pca(colours) if colours is not None and colours.exists() else None
    sources = [source for source in (model, compare) if source is not None]
    loaded = [load(source, device=device, precision=precision, stride=stride, progress=progress) for source in sources]
    report = VizReport(folder)
    maps = _possible_maps(maps, loaded, len(frames), by_name=bool(what), notes=report.notes)
    for one in loaded:
        _check_model(one, size, block)

    shown, report.unreadable = _view_images(
        frames, loaded, size=size, block=block, point=point, max_tokens=max_tokens, show=progress("images")
    )
    if report.unreadable:
        first = report.unreadable[0][1]
        report.notes.append(f"{len(report.unreadable)} of {len(frames)} images were left out, the first: {first}")
    models = _page_models(loaded, shown, block, reused=reused, foreground=foreground, norm_threshold=norm_threshold)
    if reused is not None:
        report.notes += _differences(reused, _description(loaded[0], block), foreground=foreground)
    report.basis_reused = reused is not None
    for m, drawn in enumerate(models):
        norms = torch.cat([image.views[m].norms.flatten() for image in shown])
        report.model_names.append(drawn.name)
        report.norm_thresholds.append(drawn.norm_threshold)
        report.high_norm_shares.append(high_norm_share(norms, drawn.norm_threshold))

    with lock_folder(folder, "viz"):
        report.basis = colours or folder / "basis.safetensors"
        if reused is None:
            report.basis.parent.mkdir(parents=True, exist_ok=True)
            save_pca(report.basis, models[0].basis)
        place = _share_at(point, shown[0].size)
        matches = match_images(shown, models) if page or "matches" in maps else []
        drawn_pairs = matches if "matches" in maps else []
        report.files = write_pictures(
            folder, shown, models, maps, place=place, has_point=point is not None, matches=drawn_pairs, moving=gif
        )
        if page:
            report.page = _write_page(folder, shown, models, place, matches, report.notes)
        write_json(folder / "viz.json", _as_json(report, loaded, shown, models, matches, block))
    return report


def _checked_maps(what: Sequence[str], size: int | None) -> list[str]:
    if wrong := [name for name in what if name not in _MAPS]:
        raise ConfigError(f"there are no pictures called {wrong[0]!r}; choose from {', '.join(_MAPS)}")
    if size is not None and size < 1:
        raise ConfigError(f"images cannot be {size} pixels large; write a positive number")
    return [name for name in _MAPS if not what or name in what]


def _possible_maps(
    maps: list[str], loaded: Sequence[Pretrained], n_images: int, *, by_name: bool, notes: list[str]
) -> list[str]:
    """The maps that these models and images allow; `ConfigError` for one chosen by name, else a note."""
    if "attention" in maps:
        for one in loaded:
            if not isinstance(one.backbone, DinoVisionTransformer):
                sentence = f"{one.name} is a model of another library, whose queries and keys are not shown"
                if by_name:
                    raise ConfigError(f"{sentence}; leave attention out of --what")
                notes.append(f"{sentence}: its attention is left out")
    if "matches" in maps and n_images < 2:
        if by_name:
            raise ConfigError("matches need two images, one was given; give another or leave matches out of --what")
        maps = [name for name in maps if name != "matches"]
    return maps


def _check_model(model: Pretrained, size: int | None, block: int) -> None:
    """Raise `ConfigError` when the model cannot show images of that size, or has no such block."""
    if size is not None and size < model.patch_size:
        raise ConfigError(f"images of {size} pixels hold no patch of {model.name}, which is {model.patch_size} wide")
    channels = model.in_chans
    if channels not in (1, 3):
        raise ConfigError(f"{model.name} takes images of {channels} channels; pictures have 3, or 1")
    if block != -1:
        block_number(block, model.n_blocks)


def _view_images(
    frames: Sequence[Frame],
    models: Sequence[Pretrained],
    *,
    size: int | None,
    block: int,
    point: tuple[float, float] | None,
    max_tokens: int,
    show: Callable[[int, int], None] | None,
) -> tuple[list[PageImage], list[tuple[str, str]]]:
    """Maps of every readable image by every model, and (path, reason) of the images that cannot be read.

    `size` is the shorter side in pixels, None 32 patches; an image that would be more than `max_tokens` patches is seen
    smaller. `point` is a pixel of the first readable image, whose patch's attention is taken too.

    Raises `DataError` when not one image can be read, `ConfigError` for a point outside.
    """
    images: list[PageImage] = []
    unreadable: list[tuple[str, str]] = []
    for done, (frame, picture) in enumerate(zip(frames, open_frames(frames), strict=True), start=1):
        try:
            if isinstance(picture, DataError):
                raise picture
            whole = (picture.height, picture.width)
            place = _share_at(point, whole) if point is not None and not images else None
            views = [
                view_patches(
                    model,
                    picture,
                    size=size or _PATCHES_ALONG * model.patch_size,
                    block=block,
                    point=place,
                    max_tokens=max_tokens,
                )
                for model in models
            ]
        except DataError as error:
            path, reason = str(frame.path), str(error)
            unreadable.append((path, reason if path in reason else f"{path}: {reason}"))
            continue
        if len(frames) > _MOST_IN_FLOAT32:
            views = [replace(view, patches=view.patches.half()) for view in views]
        height, width = display_size(*whole)
        small = picture.resize((width, height), Image.Resampling.LANCZOS)
        images.append(PageImage(frame.name, small, tuple(views), whole))
        if show is not None:
            show(done, len(frames))
    if not images:
        raise DataError(unreadable[0][1])
    return images, unreadable


def _share_at(point: tuple[float, float] | None, size: tuple[int, int]) -> tuple[float, float]:
    """A pixel (x, y) of an image of `size` (height, width) as shares of both; the centre when there is none."""
    if point is None:
        return 0.5, 0.5
    patch_at(*point, size=size, grid=(1, 1))  # raises outside
    return point[0] / size[1], point[1] / size[0]


def view_patches(
    model: Pretrained,
    image: Image.Image,
    *,
    size: int,
    block: int = -1,
    point: tuple[float, float] | None = None,
    max_tokens: int | None = None,
) -> PatchView:
    """Maps of one image whose shorter side becomes `size` pixels, fewer beyond `max_tokens`, behind a block.

    `point` (x and y as shares of width and height) asks for the attention of the patch there too. Models of other
    libraries give neither attention nor the tokens before their final norm; their norms are those after it.
    """
    channels = model.in_chans
    transform = model.transform_with(size=size, fit="aspect", max_tokens=max_tokens)
    pixels = transform(image if channels == 3 else image.convert("L"))[None].to(model.device)  # [1, C, H, W]
    if not isinstance(model.backbone, DinoVisionTransformer):
        return _view_patches_elsewhere(model, pixels, block)
    grid = model.patch_grid(*pixels.shape[-2:])
    registers = model.num_register_tokens
    queries = list(range(1 + registers))
    if point is not None:
        row, column = patch_at(*point, size=(1, 1), grid=grid)
        queries.append(patch_token(row, column, grid=grid, num_register_tokens=registers))
    with torch.inference_mode(), autocast(model.device, model.autocast_dtype):
        view = look_into_block(model.backbone, pixels, block=block, queries=queries)
        patches = model.backbone.norm(view.tokens)[0, 1 + registers :].float().unflatten(0, grid)
    require_finite(patches.unsqueeze(0), model=model.name)
    rows = view.attention
    return PatchView(
        patches=patches.cpu().clone(),
        norms=patch_norms(view.tokens[0, 1 + registers :]).unflatten(0, grid).cpu().clone(),
        attention=rows.to_patches[0].transpose(0, 1).cpu().clone(),  # [Q, heads, h, w]
        shares=(
            float(rows.to_cls[0, :, 0].mean()),
            float(rows.to_registers[0, :, 0].sum(dim=-1).mean()),
            float(rows.to_patches[0, :, 0].sum(dim=(-2, -1)).mean()),
        ),
    )


def _view_patches_elsewhere(model: Pretrained, pixels: torch.Tensor, block: int) -> PatchView:
    height, width = pixels.shape[-2:]
    try:
        tokens = model.encode(pixels, layers=() if block == -1 else (block,))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DinoError):
            raise
        raise ConfigError(
            f"{model.name} does not take an image of {height} x {width} pixels ({str(error).splitlines()[0]}); "
            "crop the image to a square and give the model's own --size"
        ) from error
    patches = (tokens if block == -1 else tokens.layers[block]).patches[0].cpu().clone()
    if patches.numel() == 0:
        raise ConfigError(f"{model.name} gives no patch features, only one vector an image; there is nothing to draw")
    grid = (height // model.patch_size, width // model.patch_size)
    if patches.shape[:2] != grid:
        raise ConfigError(
            f"{model.name} gives features of shape {list(patches.shape)} for a grid of {grid[0]} x {grid[1]} patches; "
            "only models whose features keep the grid of patches can be drawn"
        )
    return PatchView(patches=patches, norms=patch_norms(patches))


def _page_models(
    loaded: Sequence[Pretrained],
    images: Sequence[PageImage],
    block: int,
    *,
    reused: PcaBasis | None,
    foreground: bool,
    norm_threshold: float | None,
) -> list[PageModel]:
    """Each model with the basis of its colours and its norm threshold.

    `reused` is the basis of the first model. Other bases are fitted, and take the first one's order and signs of
    colours as far as they can. Raises `ConfigError` for a basis of features of another length.
    """
    models: list[PageModel] = []
    for m, model in enumerate(loaded):
        maps = [image.views[m].patches for image in images]
        if m == 0 and reused is not None:
            _check_width(reused, maps[0].shape[-1])
            basis = reused
        else:
            fit = fit_foreground_pca if foreground else fit_image_pca
            basis = replace(fit(maps), fitted_on=_description(model, block))
        if m > 0:
            basis = _matched(models[0].basis, basis, images, m)
        norms = torch.cat([image.views[m].norms.flatten() for image in images])
        ours = isinstance(model.backbone, DinoVisionTransformer)
        twin = model.name in [other.name for other in models]
        models.append(
            PageModel(
                name=f"{model.name} ({model.source})" if twin else model.name,
                about=f"patch {model.patch_size}, {_block_in_words(model, block)}",
                basis=basis,
                norm_threshold=high_norm_threshold(norms) if norm_threshold is None else norm_threshold,
                norm_kind="before the final norm" if ours else "after the final norm",
                num_register_tokens=model.num_register_tokens,
            )
        )
    return models


def _block_in_words(model: Pretrained, block: int) -> str:
    if block == -1 or block_number(block, model.n_blocks) == model.n_blocks - 1:
        return "last block"
    return f"block {block_number(block, model.n_blocks)} of 0 to {model.n_blocks - 1}"


def _description(model: Pretrained, block: int) -> str:
    """Origin of a basis, as its file states it."""
    return f"{model.name}, {_block_in_words(model, block)}, weights {model.digest[:12]}"


def _check_width(basis: PcaBasis, width: int) -> None:
    if basis.components.shape[-1] != width:
        origin = basis.fitted_on or "an unknown model"
        raise ConfigError(
            f"the basis belongs to features of {basis.components.shape[-1]} numbers ({origin}), and those of this "
            f"model have {width}; give another --basis"
        )


def _differences(basis: PcaBasis, fitted_on: str, *, foreground: bool) -> list[str]:
    """Notes on a basis that is reused for other features, or without a split."""
    notes = []
    if basis.fitted_on and basis.fitted_on != fitted_on:
        notes.append(f"the basis was fitted on {basis.fitted_on}; colours of {fitted_on} may mean other things")
    if foreground and basis.foreground is None:
        notes.append("the basis that is reused has no foreground split: nothing is faded")
    return notes


def _matched(first: PcaBasis, basis: PcaBasis, images: Sequence[PageImage], m: int) -> PcaBasis:
    """The basis of model m with order and signs of colours as close to the first model's as they go."""
    features: list[Tensor] = []
    reference: list[Tensor] = []
    for image in images:
        projections = first.project(image.views[0].patches).permute(2, 0, 1)[None]  # [1, n, h, w]
        size = image.views[m].grid
        reference.append(interpolate(projections, size=size, mode="bilinear")[0].permute(1, 2, 0).flatten(0, 1))
        features.append(image.views[m].patches.flatten(0, 1))
    return match_colours(basis, torch.cat(features), torch.cat(reference))


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
    return write_patch_page(
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
    images: Sequence[PageImage],
    models: Sequence[PageModel],
    matches: Sequence[PageMatches],
    block: int,
) -> dict[str, object]:
    """Measured values, as plain numbers and texts."""

    def described(view: PatchView, model: PageModel) -> dict[str, object]:
        shares = None if view.shares is None else dict(zip(("cls", "registers", "patches"), view.shares, strict=True))
        share = high_norm_share(view.norms, model.norm_threshold)
        return {"grid": list(view.grid), "high_norm_share": share, "attention_of_cls": shares}

    return {
        "models": [
            {
                "name": drawn.name,
                "source": model.source,
                "sha256": model.digest,
                "block": block,
                "patch_size": model.patch_size,
                "stride": model.stride,
                "pca_explained": drawn.basis.explained.tolist(),
                "norms": drawn.norm_kind,
                "high_norm_threshold": drawn.norm_threshold,
                "high_norm_share": share,
            }
            for model, drawn, share in zip(loaded, models, report.high_norm_shares, strict=True)
        ],
        "images": [
            {
                "name": image.name,
                "size": list(image.size),
                "views": [described(view, model) for view, model in zip(image.views, models, strict=True)],
            }
            for image in images
        ],
        "matches": [
            {
                "first": images[pair.first].name,
                "second": images[pair.second].name,
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
