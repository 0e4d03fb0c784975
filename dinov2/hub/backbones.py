"""The eight released backbones as functions, with the arguments of the public release.

Each returns a `DinoVisionTransformer` as it was constructed, hence in training mode: it has neither dropout nor, unless
asked for, drop path, so that both modes compute the same, but call `.eval()` all the same. The native image size is
518; images of any size that is a multiple of 14 work, because position embeddings are resized on the way.
"""

import math
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from dinov2.checkpoints.download import cached_path, download
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.locate import locate_checkpoint
from dinov2.checkpoints.open import open_checkpoint
from dinov2.errors import ConfigError
from dinov2.models.releases import Release, release
from dinov2.models.vision_transformer import ARCHITECTURES, DinoVisionTransformer

__all__ = [
    "Weights",
    "WrongArgument",
    "dinov2_vitb14",
    "dinov2_vitb14_reg",
    "dinov2_vitg14",
    "dinov2_vitg14_reg",
    "dinov2_vitl14",
    "dinov2_vitl14_reg",
    "dinov2_vits14",
    "dinov2_vits14_reg",
    "file_behind",
    "released_backbone",
]


class Weights(Enum):
    """Training data of the released backbones."""

    LVD142M = "LVD142M"


def released_backbone(
    name: str, *, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any
) -> DinoVisionTransformer:
    """A backbone by its name in `dinov2.models.releases`, with fresh weights or a file's, loaded strictly.

    Raises `WrongArgument` for `weights` that do not exist and for `kwargs` that the weights do not fit (checked before
    anything is fetched), `WeightsError` for a file that does not fit, `DinoError` when it cannot be had.
    """
    row = release(name)
    file = file_behind(weights, Weights, row)
    options = {**_options(row), **kwargs}
    if not pretrained:
        return DinoVisionTransformer(**options)
    if file.is_released and kwargs:
        _refuse_other_shapes(row, kwargs)
    path = file.fetch()
    checkpoint = open_checkpoint(path)
    if not file.is_released:
        _refuse_another_grid(options, checkpoint.state.get("pos_embed"), str(path))
    model = _unfilled(options)
    load_into(model, checkpoint)
    return model


class _Entry(Protocol):
    def __call__(
        self, *, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any
    ) -> DinoVisionTransformer: ...


def _entry(name: str) -> _Entry:
    row = release(name)

    def entry(
        *, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any
    ) -> DinoVisionTransformer:
        return released_backbone(name, pretrained=pretrained, weights=weights, **kwargs)

    width, depth, _ = ARCHITECTURES[row.arch]
    registers = f", {row.num_register_tokens} registers" if row.num_register_tokens else ""
    gated = ", SwiGLU" if row.ffn_layer.startswith("swiglu") else ""
    size = f"{width} wide, {depth} blocks{gated}{registers}, {(row.parameters or 0) / 1e6:,.0f} M parameters"
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""ViT-{name[10].upper().replace("G", "g")}/14: {size}.

    Args:
        pretrained: load the released weights (False: fresh ones, nothing is fetched).
        weights: a member of `Weights` or its name, or another file, folder, run, address or Hugging Face id.
        kwargs: options of `dinov2.models.vision_transformer.DinoVisionTransformer`.

    Returns:
        The model, in training mode; call `.eval()`. Images `[B, 3, H, W]` -> class tokens `[B, {width}]`.
    """
    return entry


dinov2_vits14 = _entry("dinov2_vits14")
dinov2_vitb14 = _entry("dinov2_vitb14")
dinov2_vitl14 = _entry("dinov2_vitl14")
dinov2_vitg14 = _entry("dinov2_vitg14")
dinov2_vits14_reg = _entry("dinov2_vits14_reg")
dinov2_vitb14_reg = _entry("dinov2_vitb14_reg")
dinov2_vitl14_reg = _entry("dinov2_vitl14_reg")
dinov2_vitg14_reg = _entry("dinov2_vitg14_reg")


class WrongArgument(ConfigError, AssertionError):
    """An argument that no entry takes. Also an `AssertionError`, which is what the public release raises."""


class _WeightFile(NamedTuple):
    """A file that was named but not touched yet."""

    is_released: bool
    fetch: Callable[[], Path]
    """Gives the path, after a download where one is needed."""


def file_behind(weights: object, members: type[Enum], row: Release) -> _WeightFile:
    """The weight file which an entry's argument stands for.

    `weights` is a member of `members` or its name in any case, both for the release's own file `row`, or another
    file, folder, run, address or Hugging Face id. Raises `WrongArgument` at once for anything else.
    """
    if isinstance(weights, members) or (isinstance(weights, str) and weights.upper() in members.__members__):
        return _WeightFile(True, lambda: _fetched(row.url, row.sha256))
    if isinstance(weights, str) and "://" in weights:
        return _WeightFile(False, lambda: _fetched(weights, None))
    if isinstance(weights, str | os.PathLike) and str(weights):
        path, is_id = Path(weights).expanduser(), isinstance(weights, str) and weights.count("/") == 1
        if path.suffix or path.exists() or is_id:  # one that is missing is an error of the reader
            return _WeightFile(False, lambda: locate_checkpoint(weights).path)
    names = " or ".join(repr(name) for name in members.__members__)
    raise WrongArgument(
        f"Unsupported weights: {weights!r}; for {row.hub_name} give {names}, or the path or address of a weight file"
    )


def _options(row: Release) -> dict[str, Any]:
    """Constructor options of a released model. Its LayerScale starts at 1, which only fresh weights show."""
    return {
        **ARCHITECTURES[row.arch]._asdict(),
        "img_size": row.img_size,
        "patch_size": row.patch_size,
        "init_values": 1.0,
        "ffn_layer": row.ffn_layer,
        "block_chunks": 0,
        "num_register_tokens": row.num_register_tokens,
        "interpolate_offset": row.interpolate_offset,
        "interpolate_antialias": row.interpolate_antialias,
    }


def _unfilled(options: dict[str, Any]) -> DinoVisionTransformer:
    """A model whose parameters are about to be loaded: starting values of a billion of them take long to draw."""
    with torch.device("meta"):
        model = DinoVisionTransformer(**options)
    if next(model.buffers(), None) is not None:  # of a caller's own layers, and not in the file perhaps
        return DinoVisionTransformer(**options)
    return model.to_empty(device=torch.get_default_device())


def _refuse_other_shapes(row: Release, kwargs: dict[str, Any]) -> None:
    """Released weights would not go into a model with these options; better said before they are fetched."""
    with torch.device("meta"):
        released = DinoVisionTransformer(**_options(row)).state_dict()
        # How blocks are grouped changes their keys, which loading understands.
        asked = DinoVisionTransformer(**{**_options(row), **kwargs, "block_chunks": 0}).state_dict()
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    for key in (*asked, *released):
        wanted, has = (list(state[key].shape) if key in state else "absent" for state in (asked, released))
        if wanted != has:
            raise WrongArgument(
                f"the released weights of {row.name} do not fit a model with {given}: {key} would be {wanted} and is "
                f"{has}; leave {'that' if len(kwargs) == 1 else 'those'} out (images of any size that is a multiple of "
                f"{row.patch_size} work as it is), or ask for pretrained=False"
            )


def _refuse_another_grid(options: dict[str, Any], position: torch.Tensor | None, source: str) -> None:
    """Loading would resize the position embeddings of `source` to the model's, unasked."""
    size, patch = options["img_size"], options["patch_size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    patches = (height // patch) * (width // patch)
    if position is not None and position.ndim == 3 and position.shape[1] != 1 + patches:
        held = position.shape[1] - 1
        side = math.isqrt(held)
        native = f"img_size={side * patch}" if side * side == held else "img_size=(HEIGHT, WIDTH) of its training"
        raise WrongArgument(
            f"{source} has position embeddings for {held} patches, and img_size={size!r} makes {patches}; give {native}"
        )


def _fetched(url: str, sha256: str | None) -> Path:
    show = None
    if sys.stderr is not None and sys.stderr.isatty():
        show = _line(cached_path(url).name)
    return download(url, sha256=sha256, progress=show)


def _line(name: str) -> Callable[[int, int], None]:
    """Shows a line on the terminal that is written over with each whole percent."""
    last = -1

    def show(done: int, total: int) -> None:
        nonlocal last
        percent = 100 * done // max(total, 1)
        if percent != last:
            last = percent
            end = "\n" if done >= total else ""
            sys.stderr.write(f"\r{name}: {percent:3} % of {total / 1e6:.0f} MB{end}")
            sys.stderr.flush()

    return show
