"""Pictures of a run for its report: patch features as colours, and nearest neighbours beside their query.

Both are written where the report looks for them, below `report_data/` in the run's folder; over several processes the
main process alone writes. Images are tensors [C, H, W]; only their first three channels are shown, fewer as grey.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load, save_file
from torch import Tensor

from dinov2.analysis.pca import fit_pca, match_colours
from dinov2.distributed import is_main_process
from dinov2.encode.stream import Features, evaluating
from dinov2.errors import DataError
from dinov2.eval.knn.search import nearest_neighbours
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.whole_files import write_json

__all__ = ["write_gallery", "write_pca_strip"]

_CELL = 112  # pixels of one picture in a strip
_GAP = 8
_THUMBNAIL = 96


def write_pca_strip(
    run_folder: Path | str,
    iteration: int,
    model: DinoVisionTransformer,
    images: Sequence[Tensor],
    transform: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
) -> Path:
    """Draw principal components of the patch features of one iteration as colours, a column an image, and the images.

    One basis is fitted on the patches of all images, so equal colours mean equal features along the strip. Colours
    follow those of the iteration drawn before, as far as order and signs of the components allow. `transform` makes one
    uint8 image what the model takes; all must come out with one size. Over several processes all run the model.
    """
    if not images:
        raise DataError("there are no images to draw; choose at least one")
    folder = Path(run_folder) / "report_data" / "pca"
    path = folder / f"step_{iteration}.png"
    batch = torch.stack([transform(image) for image in images]).to(device)
    with evaluating(model), torch.inference_mode():
        maps: Tensor = model.get_intermediate_layers(batch, n=1, reshape=True)[0]  # [B, D, h, w]
    if not is_main_process():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images.png").write_bytes(_png(_strip([_to_pil(image) for image in images], smooth=True)))
    features = maps.float().cpu().permute(0, 2, 3, 1).clone()  # [B, h, w, D]
    patches = features.flatten(0, 2)
    basis = fit_pca(patches)
    before = folder / "last_colours.safetensors"
    reference = load(before.read_bytes())["projections"] if before.is_file() else None
    if reference is not None and len(reference) == len(patches):
        basis = match_colours(basis, patches, reference)
    save_file({"projections": basis.project(patches)}, before)
    colours = [_to_pil(map_.permute(2, 0, 1)) for map_ in basis.to_rgb(features)]
    path.write_bytes(_png(_strip(colours, smooth=False)))
    return path


def write_gallery(
    run_folder: Path | str,
    train: Features,
    val: Features,
    *,
    train_image: Callable[[int], Tensor],
    val_image: Callable[[int], Tensor],
    n_queries: int = 10,
    k: int = 5,
) -> Path:
    """Write the k nearest training images, by cosine, of validation images at even distances, and `neighbours.json`.

    `train_image` and `val_image` give the uint8 image [C, H, W] at an index of the data set.
    """
    folder = Path(run_folder) / "report_data"
    if not is_main_process():
        return folder / "neighbours.json"
    (folder / "neighbours").mkdir(parents=True, exist_ok=True)

    def stored(name: str, image: Tensor, label: str | None) -> dict[str, object]:
        picture = _to_pil(image)
        thumbnail = _fitted(picture, min(_THUMBNAIL, max(picture.size)), smooth=True)
        (folder / "neighbours" / f"{name}.png").write_bytes(_png(thumbnail))
        return {"image": f"neighbours/{name}.png", "label": label, "similarity": None, "correct": None}

    chosen = torch.linspace(0, len(val) - 1, min(n_queries, len(val))).round().long().unique()
    queries, k = val.take(chosen), min(k, len(train))
    similarities, indices = nearest_neighbours(queries.features, train.features, k=k, cosine=True)
    rows = []
    for i in range(len(queries)):
        label = _label(queries, i)
        neighbours = []
        for j, row in enumerate(indices[i].tolist()):
            near = _label(train, row)
            neighbour = stored(f"query_{i}_nearest_{j + 1}", train_image(_position(train, row)), near)
            correct = None if label is None or near is None else label == near
            neighbours.append({**neighbour, "similarity": similarities[i, j].item(), "correct": correct})
        query = stored(f"query_{i}", val_image(_position(queries, i)), label)
        rows.append({"query": query, "neighbours": neighbours})
    return write_json(folder / "neighbours.json", rows)


def _label(features: Features, row: int) -> str | None:
    if features.labels is None or int(features.labels[row]) < 0:
        return None
    number = int(features.labels[row])
    return str(number) if features.class_names is None else features.class_names[number]


def _position(features: Features, row: int) -> int:
    return row if features.indices is None else int(features.indices[row])


def _to_pil(image: Tensor) -> Image.Image:  # uint8, or float in [0, 1], [C, H, W]
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    image = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _strip(pictures: Sequence[Image.Image], *, smooth: bool) -> Image.Image:
    """Pictures of any size fitted into square cells, side by side; what they do not cover is transparent."""
    strip = Image.new("RGBA", (len(pictures) * (_CELL + _GAP) - _GAP, _CELL))
    for i, picture in enumerate(pictures):
        fitted = _fitted(picture, _CELL, smooth=smooth)
        strip.paste(fitted, (i * (_CELL + _GAP) + (_CELL - fitted.width) // 2, (_CELL - fitted.height) // 2))
    return strip


def _fitted(picture: Image.Image, longest: int, *, smooth: bool) -> Image.Image:
    """The picture with its longer side `longest`; small ones keep their squares, for interpolation invents detail."""
    scale = longest / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BILINEAR if smooth and scale < 1 else Image.Resampling.NEAREST)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
