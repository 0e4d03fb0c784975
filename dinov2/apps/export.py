"""A model as ONNX or as a `torch.export` program, for places where this package is not installed.

One file takes any number of images of any height and width, because the position embedding is resized inside the graph
by two matrix products. What was written is opened again and compared with PyTorch at several sizes; a file that differs
is not kept.
"""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.apps.export_files import open_onnx, open_program, require_onnx, write_int8, write_onnx, write_program
from dinov2.apps.places import output_folder
from dinov2.checkpoints.files import read_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.load import check_fit
from dinov2.checkpoints.locate import ShowProgress
from dinov2.errors import ConfigError, DinoError, UnknownRelease
from dinov2.models.config import BackboneConfig
from dinov2.models.heads import LinearHead, linear_logits
from dinov2.models.releases import release
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import Pretrained, load
from dinov2.whole_files import escape_name, write_json

__all__ = ["ExportComparison", "ExportReport", "Int8Report", "export", "export_backbone"]

_Format = Literal["onnx", "torch"]

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
_OUTPUTS = {"cls": ("cls",), "tokens": ("tokens",), "both": ("cls", "tokens"), "logits": ("logits",)}


_Size = tuple[int, int, int]
"""Batch, height, width."""


class _ExportedModel(nn.Module):
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
        channels = int(self.backbone.patch_embed.in_chans)
        generator = torch.Generator().manual_seed(0)
        images = torch.zeros(batch, channels, height, width)
        for cells in (2, 8, 32):
            noise = torch.randn(batch, channels, cells, cells, generator=generator)
            images += F.interpolate(noise, (height, width), mode="bilinear", align_corners=False)
        return images


@dataclass(frozen=True)
class ExportComparison:
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


@dataclass(frozen=True)
class ExportReport:
    """Written files, and their distance from PyTorch."""

    path: Path
    format: str
    size_bytes: int
    """Of the file and, above 2 GB, its weights beside it."""
    outputs: tuple[str, ...]
    metadata: dict[str, Any]
    """Metadata of the file."""
    tolerance: float
    comparisons: list[ExportComparison]
    int8: Int8Report | None = None


def export(
    model: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    format: _Format | None = None,
    head: str | os.PathLike[str] | None = None,
    json_file: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: ShowProgress | None = None,
    **options: Any,
) -> ExportReport:
    """Loads a model and writes it as `export_backbone` does with the other options; the summary goes to `json_file`.

    `output` is a file that ends in .onnx or .pt2, or an existing folder. `head` is the file of a linear classifier, for
    a model that brings none or another. Raises `ConfigError` for models of other libraries, whose graphs are not ours
    to record.
    """
    path = Path(output).expanduser()
    kind = format or "onnx" if path.is_dir() else _format_of(path, format)
    if kind == "onnx":
        require_onnx()
    output_folder(path if path.is_dir() else path.parent, task="export")
    loaded = load(model, device="cpu", precision="fp32", progress=progress)
    if not isinstance(loaded.backbone, DinoVisionTransformer):
        raise ConfigError(f"{loaded.name} is a model of another library; export it with that library")
    check_fit(loaded.backbone.state_dict(), BackboneConfig.from_table(loaded.table), source=str(model))
    if path.is_dir():
        path = path / f"{Path(loaded.name).stem}{_SUFFIXES[kind]}"
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"ONNX Runtime opens names in UTF-8 alone, and {path} is none; choose another -o") from error
    say(f"{loaded.name}: {loaded.report}")
    classifier = loaded.head
    if head is not None:
        classifier = head_from_state(read_file(head), embed_dim=loaded.embed_dim, source=str(head))
    report = export_backbone(
        loaded.backbone, path, head=classifier, format=kind, facts=_facts(loaded), say=say, **options
    )
    if json_file:
        write_json(Path(json_file).expanduser(), asdict(report))
    return report


def export_backbone(
    backbone: DinoVisionTransformer,
    path: str | os.PathLike[str],
    *,
    head: LinearHead | None = None,
    format: _Format | None = None,
    outputs: str | None = None,
    int8: bool = False,
    opset: int = 20,
    check_sizes: Sequence[tuple[int, ...]] = (),
    tolerance: float = 1e-4,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Writes a backbone, or a classifier, and compares the file with PyTorch.

    Args:
        backbone: left as it is; a copy is exported where it is not in evaluation mode, on the CPU and in float32.
        path: the file; one that is there already is replaced when the new one has passed.
        head: a linear classifier on top.
        format: `onnx` or `torch`; by default what the file's name ends in says it.
        outputs: `cls` `[B, D]`, `tokens` `[B, 1+R+h*w, D]` (class token, registers, patches row by row, after the final
            norm), `both`, or with a head `logits` `[B, classes]`; by default `logits` with a head, else `both`.
        int8: also write `<name>.int8.onnx`, and measure it.
        opset: version of the ONNX operators.
        check_sizes: `(height, width)` or `(batch, height, width)`; pairs are checked with one and three images in turn.
            By default 16 x 16 and 7 x 11 patches and the native size.
        tolerance: largest difference, relative to the largest value of an output where that is above 1.
        facts: what the file says of itself besides its architecture, such as `mean` and `std`.
        say: is told what is being done.

    Raises:
        ConfigError: an option that does not fit the model.
        DinoError: the file differs from PyTorch or could not be written; nothing is left behind then.
        MissingDependency: the packages for ONNX are not installed.
    """
    path = Path(path)
    kind = _format_of(path, format)
    names = _output_names(outputs, head)
    sizes = _sizes(check_sizes, backbone)
    if kind == "onnx":
        require_onnx()
    elif int8:
        raise ConfigError("int8 is made by onnxruntime; export to a file that ends in .onnx")
    model = _ready(_ExportedModel(backbone, head, names))
    metadata = {**_architecture(backbone, names), **(facts or {})}
    with _written_whole(path) as draft:
        say("recording the graph")
        _write(model, draft, kind, opset, metadata)
        say("comparing the file with PyTorch")
        comparisons = _compare(model, open_onnx(draft) if kind == "onnx" else open_program(draft), sizes)
        _refuse_above(tolerance, comparisons, path)
        n_bytes = sum(file.stat().st_size for file in draft.parent.iterdir())
        if int8:
            say("reducing to int8")
        reduced = _measure_int8(model, draft, sizes) if int8 else None
    if reduced is not None:
        reduced = replace(reduced, path=path.with_name(reduced.path.name))
    return ExportReport(path, kind, n_bytes, names, metadata, tolerance, comparisons, reduced)


def _write(model: _ExportedModel, path: Path, kind: _Format, opset: int, metadata: dict[str, Any]) -> None:
    patch, channels = model.backbone.patch_size, model.backbone.patch_embed.in_chans
    # Two patches a side at least: the recorder asks of every size whether it is 1, and keeps the answer.
    height, width = (torch.export.Dim(name, min=2) for name in ("h", "w"))
    dynamic_shapes = {"images": {0: torch.export.Dim("batch"), 2: patch * height, 3: patch * width}}
    # The sides mean nothing, but must differ and be more than one patch, or they would count as constants.
    example = torch.zeros(2, channels, 3 * patch, 4 * patch)
    with torch.no_grad():
        if kind == "onnx":
            text = {
                key: escape_name(value) if isinstance(value, str) else json.dumps(value)
                for key, value in metadata.items()
            }
            write_onnx(
                model, example, path, dynamic_shapes=dynamic_shapes, outputs=model.names, opset=opset, metadata=text
            )
        else:
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes)
            write_program(program, path, metadata)


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own, whose files move to their place after a successful end.

    Weights beside an ONNX file are found by name, so that files cannot be renamed one by one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        try:
            yield Path(folder) / path.name
            # The model comes last, so that it is never there without its weights.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)
        except OSError as error:
            reason = error.strerror or error
            raise DinoError(f"{path} could not be written ({reason}); free some space there and start again") from error


def _refuse_above(tolerance: float, comparisons: Sequence[ExportComparison], path: Path) -> None:
    for found in comparisons:
        if found.exceeds(tolerance):
            name, error = max(found.errors.items(), key=lambda item: item[1] / max(1.0, found.largest[item[0]]))
            raise DinoError(
                f"{path} was not kept: its {name} differs from PyTorch's by {error:.1e} for images of "
                f"{' x '.join(map(str, found.size))}, and {tolerance:.0e} of the largest value, "
                f"{found.largest[name]:.2g}, is allowed; update onnx, onnxscript and onnxruntime, or allow more with "
                "--tolerance"
            )


def _ready(model: _ExportedModel) -> _ExportedModel:
    """The model itself where it is in evaluation mode, on the CPU and in float32, else a copy that is."""
    plain = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in model.parameters())
    if not plain or any(part.training for part in model.children()):
        model = copy.deepcopy(model).cpu().float()
    return model.eval()


def _format_of(path: Path, format: str | None) -> _Format:
    kind: _Format
    for kind in ("onnx", "torch"):
        if format in (None, kind) and path.suffix == _SUFFIXES[kind]:
            return kind
    if format is None:
        raise ConfigError(f"{path} does not say what to write; end it in .onnx or .pt2 (torch.export)")
    if format not in _SUFFIXES:
        raise ConfigError(f"the format is {format!r}; write onnx or torch")
    raise ConfigError(f"{path} has the wrong ending for the format {format}; end it in {_SUFFIXES[format]}")


def _output_names(outputs: str | None, head: LinearHead | None) -> tuple[str, ...]:
    chosen = outputs or ("logits" if head is not None else "both")
    if chosen not in _OUTPUTS:
        raise ConfigError(f"the outputs are {chosen!r}; choose one of {', '.join(_OUTPUTS)}")
    if chosen == "logits" and head is None:
        raise ConfigError("this model has no classifier and so no logits; choose cls, tokens or both")
    return _OUTPUTS[chosen]


def _sizes(asked: Sequence[tuple[int, ...]], backbone: DinoVisionTransformer) -> list[tuple[int, int, int]]:
    patch = backbone.patch_size
    pairs = list(asked) or [(16 * patch, 16 * patch), (7 * patch, 11 * patch), backbone.patch_embed.img_size]
    # One and three: a graph that took the batch of the recording, two, for a constant fails on both.
    sizes = [(1, *size) if len(size) == 2 and not index % 2 else size for index, size in enumerate(pairs)]
    sizes = [(3, *size) if len(size) == 2 else size for size in sizes]
    for size in sizes:
        if len(size) != 3 or min(size) < 1 or size[1] % patch or size[2] % patch or min(size[1:]) < 2 * patch:
            raise ConfigError(
                f"a size to check is {'x'.join(map(str, size))}; write HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH with sides "
                f"that are multiples of the patch size {patch}, two patches or more"
            )
    return [(batch, height, width) for batch, height, width in sizes]


def _architecture(backbone: DinoVisionTransformer, names: Sequence[str]) -> dict[str, Any]:
    patch = backbone.patch_size
    return {
        "input": f"images: float32 [batch, {backbone.patch_embed.in_chans}, height, width], RGB in 0..1 minus mean, "
        f"divided by std; height and width are multiples of {patch}, from {2 * patch}",
        "outputs": list(names),
        "patch_size": patch,
        "embed_dim": backbone.embed_dim,
        "num_register_tokens": backbone.num_register_tokens,
        "native_size": list(backbone.patch_embed.img_size),
    }


def _facts(loaded: Pretrained) -> dict[str, Any]:
    """Metadata on the origin of the weights and the preprocessing; the licence only where it is known."""
    facts = {
        "model": loaded.name,
        "sha256": loaded.digest,
        "mean": list(loaded.transform.mean),
        "std": list(loaded.transform.std),
        "crop_size": loaded.transform.crop_size,
    }
    try:
        row = release(loaded.name)
    except UnknownRelease:
        return facts
    return {**facts, "source": row.url, "licence": row.licence}


@torch.no_grad()
def _compare(
    model: _ExportedModel, exported: Callable[[Tensor], dict[str, Tensor]], sizes: Sequence[_Size]
) -> list[ExportComparison]:
    """Both on the same images, size by size."""
    comparisons = []
    for size in sizes:
        images = model.probe(size)
        expected, got = model(images), exported(images)
        errors = {name: _largest(got[name] - value) for name, value in expected.items()}
        comparisons.append(ExportComparison(size, errors, {name: _largest(value) for name, value in expected.items()}))
    return comparisons


@torch.no_grad()
def _measure_int8(model: _ExportedModel, path: Path, sizes: Sequence[_Size]) -> Int8Report:
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
    times = _interleaved_milliseconds([lambda: plain(images), lambda: small(images)])
    milliseconds = dict(zip(("float32", "int8"), times, strict=True))
    n_bytes = sum(file.stat().st_size for file in target.parent.glob(f"{target.name}*"))
    return Int8Report(target, n_bytes, cosine, relative, timed, milliseconds, torch.get_num_threads())


def _vectors(found: dict[str, Tensor], model: _ExportedModel) -> dict[str, Tensor]:
    """Outputs by what their vectors stand for: of the tokens the class token and the patches."""
    if "tokens" not in found:
        return found
    first_patch = 1 + model.backbone.num_register_tokens
    return {"cls": found["tokens"][:, 0], "patches": found["tokens"][:, first_patch:]}


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _interleaved_milliseconds(runs: Sequence[Callable[[], object]], *, rounds: int = 7) -> list[float]:
    """Median time of each function, taking turns, so that a busy moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()  # the first call allocates
    for _ in range(rounds):
        for run, measured in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            measured.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(measured) for measured in times]
