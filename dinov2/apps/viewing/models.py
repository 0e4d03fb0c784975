"""A model as `dinov2 viz` needs it: what it sees in one image, and how its colours and norms are to be read."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch.nn.functional import interpolate

from dinov2.analysis.attention_maps import block_number, look_into_block, patch_token
from dinov2.analysis.patch_maps import PatchView, high_norm_threshold, patch_at, patch_norms
from dinov2.analysis.pca import PcaBasis, fit_foreground_pca, fit_image_pca, match_colours
from dinov2.encode.tokens import require_finite
from dinov2.engine.parallel import autocast
from dinov2.errors import ConfigError, DinoError
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import Pretrained
from dinov2.report.viz_data import PageImage, PageModel

__all__ = ["check_model", "described", "look"]


def look(
    model: Pretrained,
    image: Image.Image,
    *,
    size: int,
    block: int = -1,
    point: tuple[float, float] | None = None,
    max_tokens: int | None = None,
) -> PatchView:
    """What a model sees in a picture whose shorter side becomes `size` pixels, fewer beyond `max_tokens`, at a block.

    `point` (x and y as shares of width and height) asks for the attention of the patch there too. Models of other
    libraries give neither attention nor the tokens before their final norm; their norms are those after it.
    """
    channels = model.in_chans
    transform = model.transform_with(size=size, fit="aspect", max_tokens=max_tokens)
    pixels = transform(image if channels == 3 else image.convert("L"))[None].to(model.device)  # [1, C, H, W]
    if not isinstance(model.backbone, DinoVisionTransformer):
        return _look_of_peer(model, pixels, block)
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


def _look_of_peer(model: Pretrained, pixels: torch.Tensor, block: int) -> PatchView:
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


def check_model(model: Pretrained, size: int | None, block: int) -> None:
    """Raises `ConfigError` when the model cannot show images of that size, or has no such block."""
    if size is not None and size < model.patch_size:
        raise ConfigError(f"images of {size} pixels hold no patch of {model.name}, which is {model.patch_size} wide")
    channels = model.in_chans
    if channels not in (1, 3):
        raise ConfigError(f"{model.name} takes images of {channels} channels; pictures have 3, or 1")
    if block != -1:
        block_number(block, model.n_blocks)


def described(
    loaded: Sequence[Pretrained],
    images: Sequence[PageImage],
    *,
    block: int = -1,
    kept: PcaBasis | None = None,
    foreground: bool = False,
    norm_threshold: float | None = None,
) -> tuple[list[PageModel], list[str]]:
    """Each model with the basis of its colours and its norm threshold, and what a user should know of them.

    `kept` is a basis to reuse for the first model; the others are fitted, and take the first one's order and signs of
    colours as far as they can. Raises `ConfigError` for a basis of features of another length.
    """
    models: list[PageModel] = []
    notes: list[str] = []
    for m, one in enumerate(loaded):
        maps = [image.views[m].patches for image in images]
        if m == 0 and kept is not None:
            notes += _check_basis(kept, maps[0].shape[-1], _fitted_on(one, block), foreground)
            basis = kept
        else:
            fit = fit_foreground_pca if foreground else fit_image_pca
            basis = replace(fit(maps), fitted_on=_fitted_on(one, block))
        if m > 0:
            basis = _coloured_like(models[0].basis, basis, images, m)
        norms = torch.cat([image.views[m].norms.flatten() for image in images])
        ours = isinstance(one.backbone, DinoVisionTransformer)
        twin = one.name in [model.name for model in models]
        models.append(
            PageModel(
                name=f"{one.name} ({one.source})" if twin else one.name,
                about=f"patch {one.patch_size}, {_block_in_words(one, block)}",
                basis=basis,
                norm_threshold=high_norm_threshold(norms) if norm_threshold is None else norm_threshold,
                norm_kind="before the final norm" if ours else "after the final norm",
                num_register_tokens=one.num_register_tokens,
            )
        )
    return models, notes


def _block_in_words(model: Pretrained, block: int) -> str:
    if block == -1 or block_number(block, model.n_blocks) == model.n_blocks - 1:
        return "last block"
    return f"block {block_number(block, model.n_blocks)} of 0 to {model.n_blocks - 1}"


def _fitted_on(model: Pretrained, block: int) -> str:
    return f"{model.name}, {_block_in_words(model, block)}, weights {model.digest[:12]}"


def _check_basis(kept: PcaBasis, width: int, fitted_on: str, foreground: bool) -> list[str]:
    """What is odd about reusing a basis; raises `ConfigError` when it is impossible."""
    if kept.components.shape[-1] != width:
        origin = kept.fitted_on or "an unknown model"
        raise ConfigError(
            f"the basis belongs to features of {kept.components.shape[-1]} numbers ({origin}), and those of this model "
            f"have {width}; give another --basis"
        )
    notes = []
    if kept.fitted_on and kept.fitted_on != fitted_on:
        notes.append(f"the basis was fitted on {kept.fitted_on}; colours of {fitted_on} may mean other things")
    if foreground and kept.foreground is None:
        notes.append("the basis that is reused has no foreground split: nothing is faded")
    return notes


def _coloured_like(first: PcaBasis, basis: PcaBasis, images: Sequence[PageImage], m: int) -> PcaBasis:
    """The basis of model m with order and signs of colours as close to the first model's as they go."""
    features, reference = [], []
    for image in images:
        there = first.project(image.views[0].patches).permute(2, 0, 1)[None]  # [1, n, h, w]
        size = image.views[m].grid
        reference.append(interpolate(there, size=size, mode="bilinear")[0].permute(1, 2, 0).flatten(0, 1))
        features.append(image.views[m].patches.flatten(0, 1))
    return match_colours(basis, torch.cat(features), torch.cat(reference))
