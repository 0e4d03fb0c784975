"""Pictures for the report: patch features as colours, and nearest neighbours beside their query.

The functions return PNG bytes or plain values; `write_pca_strip` and `write_gallery` put them where the report looks
for them. Images are uint8 tensors [C, H, W]; only their first three channels are shown, fewer are shown as grey.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save_file
from torch import Tensor
from torch.nn.functional import interpolate

from dinov2.analysis.pca import PcaBasis, fit_pca, match_colours
from dinov2.distributed import is_main_process
from dinov2.encode.stream import Features, evaluating
from dinov2.errors import DataError
from dinov2.eval.knn.search import nearest_neighbours
from dinov2.whole_files import write_json

__all__ = [
    "Neighbour",
    "NeighbourRow",
    "encode_png",
    "image_strip",
    "neighbour_gallery",
    "patch_features",
    "pca_strip",
    "write_gallery",
    "write_pca_strip",
]

_CELL = 112  # pixels of one picture in a strip
_GAP = 8


@dataclass(frozen=True)
class Neighbour:
    """One picture of the gallery."""

    png: bytes
    label: str | None
    similarity: float | None = None
    """Cosine similarity to the query; None for the query itself."""
    correct: bool | None = None
    """Whether it is of the query's class; None where labels are unknown, and for the query itself."""


@dataclass(frozen=True)
class NeighbourRow:
    """A query and its neighbours, nearest first."""

    query: Neighbour
    neighbours: tuple[Neighbour, ...]


def encode_png(image: Tensor) -> bytes:
    """PNG of an image [C, H, W], uint8 or float in [0, 1], as it is shown here: three channels or grey."""
    return _png(_as_rgb(image))


def patch_features(
    model: Any, images: Sequence[Tensor], transform: Callable[[Tensor], Tensor], *, device: torch.device | str = "cpu"
) -> Tensor:  # -> float32 [B, h, w, D]
    """Normalised patch features of the last block, in evaluation mode and float32, on the CPU.

    `transform` makes one uint8 image [C, H, W] what the model takes; all must come out with one size.
    """
    if not images:
        raise DataError("there are no images to draw; choose at least one")
    batch = torch.stack([transform(image) for image in images]).to(device)
    with evaluating(model), torch.inference_mode():
        maps: Tensor = model.get_intermediate_layers(batch, n=1, reshape=True)[0]  # [B, D, h, w]
    return maps.float().cpu().permute(0, 2, 3, 1).clone()


def pca_strip(
    model: Any,
    images: Sequence[Tensor],
    transform: Callable[[Tensor], Tensor],
    *,
    basis: PcaBasis | None = None,
    device: torch.device | str = "cpu",
) -> bytes:
    """PNG with the principal components of each image's patch features as colours, one column per image.

    The image stands above its map. Without a basis one is fitted on the patches of all images together, so equal
    colours mean equal features along the strip.
    """
    features = patch_features(model, images, transform, device=device)
    basis = fit_pca(features.flatten(0, 2)) if basis is None else basis
    above, below = _strip([_as_rgb(image) for image in images], smooth=True), _map_row(features, basis)
    return _png(torch.cat([above, torch.zeros(4, _GAP, above.shape[2]), below], dim=1))


def image_strip(images: Sequence[Tensor]) -> bytes:
    """PNG with the images side by side, columns as in `pca_strip`."""
    return _png(_strip([_as_rgb(image) for image in images], smooth=True))


def write_pca_strip(
    run_folder: Path | str,
    iteration: int,
    model: Any,
    images: Sequence[Tensor],
    transform: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
) -> Path:
    """Draw the maps of one iteration into the run's `report_data/pca/`, and the images themselves.

    Colours follow those of the iteration drawn before, as far as order and signs of the components allow. Over several
    processes all run the model, and the main process alone writes.
    """
    folder = Path(run_folder) / "report_data" / "pca"
    path = folder / f"step_{iteration}.png"
    features = patch_features(model, images, transform, device=device)
    if not is_main_process():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images.png").write_bytes(image_strip(images))
    patches = features.flatten(0, 2)
    basis = fit_pca(patches)
    before = folder / "last_colours.safetensors"
    reference = load(before.read_bytes())["projections"] if before.is_file() else None
    if reference is not None and len(reference) == len(patches):
        basis = match_colours(basis, patches, reference)
    save_file({"projections": basis.project(patches)}, before)
    path.write_bytes(_png(_map_row(features, basis)))
    return path


def neighbour_gallery(
    train: Features,
    val: Features,
    *,
    train_image: Callable[[int], Tensor],
    val_image: Callable[[int], Tensor],
    n_queries: int = 10,
    k: int = 5,
) -> list[NeighbourRow]:
    """The k nearest training images, by cosine, of validation images taken at even distances from the whole set.

    `train_image` and `val_image` give the uint8 image [C, H, W] at an index of the data set.
    """
    rows = torch.linspace(0, len(val) - 1, min(n_queries, len(val))).round().long().unique()
    queries = val.take(rows)
    k = min(k, len(train))
    similarities, indices = nearest_neighbours(queries.features, train.features, k=k, cosine=True)
    gallery = []
    for i in range(len(queries)):
        name = _label(queries, i)
        neighbours = []
        for j in range(k):
            row = int(indices[i, j])
            label = _label(train, row)
            neighbours.append(
                Neighbour(
                    png=_thumbnail(train_image(_position(train, row))),
                    label=label,
                    similarity=similarities[i, j].item(),
                    correct=None if name is None or label is None else name == label,
                )
            )
        query = Neighbour(png=_thumbnail(val_image(_position(queries, i))), label=name)
        gallery.append(NeighbourRow(query, tuple(neighbours)))
    return gallery


def write_gallery(run_folder: Path | str, gallery: Sequence[NeighbourRow]) -> Path:
    """Write the pictures and `neighbours.json` into the run's `report_data/`; the main process alone does."""
    folder = Path(run_folder) / "report_data"
    if not is_main_process():
        return folder / "neighbours.json"
    (folder / "neighbours").mkdir(parents=True, exist_ok=True)

    def stored(name: str, picture: Neighbour) -> dict[str, Any]:
        (folder / "neighbours" / f"{name}.png").write_bytes(picture.png)
        return {
            "image": f"neighbours/{name}.png",
            "label": picture.label,
            "similarity": picture.similarity,
            "correct": picture.correct,
        }

    rows = [
        {
            "query": stored(f"query_{i}", row.query),
            "neighbours": [stored(f"query_{i}_nearest_{j}", near) for j, near in enumerate(row.neighbours, start=1)],
        }
        for i, row in enumerate(gallery)
    ]
    return write_json(folder / "neighbours.json", rows)


def _map_row(features: Tensor, basis: PcaBasis) -> Tensor:  # [B, h, w, D] -> RGBA [4, cell, ...]
    return _strip([colours.permute(2, 0, 1) for colours in basis.to_rgb(features)], smooth=False)


def _label(features: Features, row: int) -> str | None:
    if features.labels is None or int(features.labels[row]) < 0:
        return None
    number = int(features.labels[row])
    return str(number) if features.class_names is None else features.class_names[number]


def _position(features: Features, row: int) -> int:
    return row if features.indices is None else int(features.indices[row])


def _as_rgb(image: Tensor) -> Tensor:  # uint8 or float [C, H, W] -> float32 [3, H, W]
    image = image.detach().cpu()
    image = image.float() if image.is_floating_point() else image.float() / 255
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)


def _strip(pictures: Sequence[Tensor], *, smooth: bool) -> Tensor:  # n of [3, H, W] -> RGBA [4, cell, ...]
    """Pictures of any size fitted into square cells, side by side; what they do not cover is transparent."""
    cells = []
    for picture in pictures:
        fitted = _fitted(picture, _CELL, smooth=smooth)
        height, width = fitted.shape[-2:]
        cell = torch.zeros(4, _CELL, _CELL)
        top, left = (_CELL - height) // 2, (_CELL - width) // 2
        cell[:3, top : top + height, left : left + width] = fitted
        cell[3, top : top + height, left : left + width] = 1
        cells += [cell, torch.zeros(4, _CELL, _GAP)]
    return torch.cat(cells[:-1], dim=2)


def _fitted(picture: Tensor, longest: int, *, smooth: bool) -> Tensor:  # [3, H, W] -> [3, h, w]
    """The picture with its longer side `longest`; small ones keep their squares, for interpolation invents detail."""
    height, width = picture.shape[-2:]
    scale = longest / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if smooth and scale < 1:
        return interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]
    return interpolate(picture[None], size=size, mode="nearest-exact")[0]


def _thumbnail(image: Tensor) -> bytes:
    picture = _as_rgb(image)
    return _png(_fitted(picture, min(96, max(picture.shape[-2:])), smooth=True))


def _png(pixels: Tensor) -> bytes:  # float32 [3 or 4, H, W] in [0, 1]
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
