"""A written file beside the PyTorch model that it came from: differences, and what int8 costs and brings.

The images are noise at several scales, about as rough as photographs after normalisation and always the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.apps.exporting.onnx_files import interleaved_milliseconds, open_onnx, write_int8
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.models.heads import LinearHead, linear_logits
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["Comparison", "ExportedModel", "Int8Report", "compare", "measure_int8"]

_Size = tuple[int, int, int]
"""Batch, height, width."""


class ExportedModel(nn.Module):
    """Normalised images `[B, C, H, W]` to a dict of the outputs asked for: `cls`, `tokens`, `logits`."""

    def __init__(self, backbone: DinoVisionTransformer, head: LinearHead | None, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.head, self.names = backbone, head if "logits" in names else None, tuple(names)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`cls` `[B, D]`, `tokens` `[B, 1+R+N, D]`, `logits` `[B, C]`."""
        if self.head is not None:
            return {"logits": linear_logits(self.backbone, self.head, images)}
        features = self.backbone.forward_features(images)
        cls = features["x_norm_clstoken"]  # [B, D]
        parts = [cls[:, None], features["x_norm_regtokens"], features["x_norm_patchtokens"]]
        found = {"cls": cls, "tokens": torch.cat(parts, dim=1)}
        return {name: found[name] for name in self.names}

    def probe(self, size: _Size) -> Tensor:
        """Images `[B, C, H, W]` to compare on."""
        batch, height, width = size
        embed: PatchEmbed = self.backbone.patch_embed
        generator = torch.Generator().manual_seed(0)
        images = torch.zeros(batch, embed.in_chans, height, width)
        for cells in (2, 8, 32):
            noise = torch.randn(batch, embed.in_chans, cells, cells, generator=generator)
            images += F.interpolate(noise, (height, width), mode="bilinear", align_corners=False)
        return images


_Runner = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """Largest absolute difference to PyTorch, and PyTorch's own largest value, of each output at one image size."""

    size: _Size
    """Batch, height, width."""
    errors: dict[str, float]
    largest: dict[str, float]

    def exceeds(self, tolerance: float) -> bool:
        """Whether an output is off by more than the tolerance, relative to its largest value where that is above 1."""
        # Written so that a NaN exceeds.
        return not all(error <= tolerance * max(1.0, self.largest[name]) for name, error in self.errors.items())


@dataclass(frozen=True)
class Int8Report:
    """The int8 file beside the float32 one: how far its features are off, and both speeds in onnxruntime."""

    path: Path
    size_bytes: int
    cosine: dict[str, float]
    """Lowest cosine between a vector of the int8 model and the same one of PyTorch, over all sizes checked."""
    relative_l2: dict[str, float]
    """Norm of the difference over the norm of PyTorch's output, the highest of all sizes."""
    timed: _Size
    milliseconds: dict[str, float]
    """Median time of `float32` and `int8` on this machine."""
    threads: int


@torch.no_grad()
def compare(model: ExportedModel, exported: _Runner, sizes: Sequence[_Size]) -> list[Comparison]:
    """Both on the same images, size by size."""
    comparisons = []
    for size in sizes:
        images = model.probe(size)
        expected, got = model(images), exported(images)
        errors = {name: _largest(got[name] - value) for name, value in expected.items()}
        comparisons.append(Comparison(size, errors, {name: _largest(value) for name, value in expected.items()}))
    return comparisons


@torch.no_grad()
def measure_int8(model: ExportedModel, path: Path, sizes: Sequence[_Size]) -> Int8Report:
    """Writes `<name>.int8.onnx` beside the ONNX file `path`, compares it with PyTorch and times both files."""
    target = path.with_suffix(".int8.onnx")
    write_int8(path, target)
    plain, small = open_onnx(path), open_onnx(target)
    cosine: dict[str, float] = {}
    relative: dict[str, float] = {}
    for size in sizes:
        images = model.probe(size)
        got = _vectors(small(images), model)
        for name, expected in _vectors(model(images), model).items():
            lowest = float(F.cosine_similarity(got[name], expected, dim=-1).min())
            cosine[name] = min(lowest, cosine.get(name, 1.0))
            relative[name] = max(float((got[name] - expected).norm() / expected.norm()), relative.get(name, 0.0))
    timed = (1, *sizes[0][1:])
    images = model.probe(timed)
    times = interleaved_milliseconds([lambda: plain(images), lambda: small(images)])
    milliseconds = dict(zip(("float32", "int8"), times, strict=True))
    n_bytes = sum(file.stat().st_size for file in target.parent.glob(f"{target.name}*"))
    return Int8Report(target, n_bytes, cosine, relative, timed, milliseconds, torch.get_num_threads())


def _vectors(found: dict[str, Tensor], model: ExportedModel) -> dict[str, Tensor]:
    """Outputs by what their vectors stand for: of the tokens the class token and the patches."""
    if "tokens" not in found:
        return found
    first_patch = 1 + model.backbone.num_register_tokens
    return {"cls": found["tokens"][:, 0], "patches": found["tokens"][:, first_patch:]}


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
