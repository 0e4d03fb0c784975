"""Backbone weights found in whatever holds them, and loaded strictly with a report.

`open_weights` reads a file or a folder; `load_into` puts tensors into a model and refuses anything that does not fit.
Both know the layouts of `dinov2.models.layouts` and what training programs wrap around a backbone.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.models import files, tables
from dinov2.models.folders import facts_beside, read_folder
from dinov2.models.layouts import flat_key, layout_of, release_order, split_classifier, to_original
from dinov2.models.refusals import family_of, refusal
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "LoadReport",
    "OpenedWeights",
    "backbone_state",
    "build_from_table",
    "load_into",
    "model_table",
    "open_weights",
    "ratio_for",
    "read_file",
    "save_teacher",
]

build_from_table, model_table, ratio_for = tables.build_from_table, tables.model_table, tables.ratio_for
read_file = files.read_file

_HEADS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
# What wrappers of modules leave in the middle of a name.
_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class LoadReport(NamedTuple):
    """What a strict load did, by key."""

    matched: int
    resized: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.matched} tensors loaded"]
        if self.resized:
            parts.append(f"resized: {', '.join(self.resized)}")
        of_heads = sum(key.startswith(_HEADS) for key in self.dropped)
        if of_heads:
            parts.append(f"{of_heads} of projection heads left out")
        if len(self.dropped) > of_heads:
            parts.append(f"{len(self.dropped) - of_heads} of a classifier left out")
        return "; ".join([*parts, *self.notes])


class OpenedWeights(NamedTuple):
    """A backbone as it was found: tensors as stored, under the release's flat keys."""

    state: dict[str, Tensor]
    table: dict[str, Any] | None
    """The `model` table, or None where nothing but the tensors tells the architecture (`dinov2.models.recognise`)."""
    layout: Literal["original", "hf", "timm", "own", "training"]
    head: dict[str, Tensor] | None
    """`{"weight", "bias"}` of the linear classifier that lay beside the backbone."""
    notes: tuple[str, ...]
    """A sentence for each tensor that was made up, folded or left out."""
    files: tuple[Path, ...]
    """Every file that was read."""
    dropped: tuple[str, ...] = ()
    """Keys of projection heads and losses, which no backbone needs."""


class _Found(NamedTuple):
    state: dict[str, Tensor]
    layout: Literal["original", "hf", "timm", "training"] | None
    head: dict[str, Tensor] | None
    notes: tuple[str, ...]
    dropped: tuple[str, ...]


def open_weights(path: str | os.PathLike[str]) -> OpenedWeights:
    """Reads a weight file, or a folder as Hugging Face and timm write it, in any layout this package knows.

    Raises `WeightsError`, in one sentence, for what is missing, damaged, unsafe, no DINOv2 backbone, or a folder whose
    configuration and tensors disagree.
    """
    path = Path(path).expanduser()
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise WeightsError(f"there is no weight file {path}; check the path") from error
    if is_folder:
        content, read, facts = read_folder(path)
    else:
        content, read = read_file(path), (path,)
        facts = None if isinstance(content.get("model"), dict) else facts_beside(path)
    found = _found(content, str(path))
    if found.layout is None:
        raise WeightsError(_no_backbone(str(path), found))
    table = content.get("model")
    state = release_order({flat_key(key): value for key, value in found.state.items()})
    layout: Any = found.layout
    if isinstance(table, dict) and "embed_dim" in table:
        layout = "own"
        _must_agree(table, state, str(path))
    else:
        table = None if facts is None else facts.table(state, source=str(path))
    return OpenedWeights(state, table, layout, found.head, found.notes, tuple(read), found.dropped)


def backbone_state(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Backbone tensors under the release's bare keys, and the keys of heads that were left out.

    Takes released files, teacher files (`teacher` or `backbone.` prefixes), training states (`student.`, `teacher.`, of
    which the teacher is used), classifiers with their backbone, and state dicts of Hugging Face's and timm's models;
    also below `state_dict` or `model`.
    """
    found = _found(content, "the file")
    return found.state, _left_out(found)


def load_into(model: DinoVisionTransformer, content: Mapping[str, Any], *, source: str = "the file") -> LoadReport:
    """Loads backbone weights strictly; only the position grid may differ, and is resized by the model's rule.

    `content` is what `read_file` or a module's `state_dict` gives, in any layout. Raises `WeightsError` with the first
    differences and the likely cause. A model on the meta device takes over the tensors instead of copying them.
    """
    found = _found(content, source)
    if not found.state:
        raise WeightsError(_no_backbone(source, found) if found.head else f"{source} holds no backbone weights")
    given = {flat_key(key): value for key, value in found.state.items()}
    table = content.get("model")
    native = tuple(table["img_size"]) if isinstance(table, dict) and _is_pair(table.get("img_size")) else None
    resized = _fit_positions(given, model, source, native)
    expected = {flat_key(key): value for key, value in model.state_dict().items()}
    if sentence := refusal(source, given, expected):
        raise WeightsError(sentence)
    if model.cls_token.is_meta:  # built without memory: takes over the tensors, where a copy would do nothing
        given = {key: value.to(expected[key].dtype) for key, value in given.items()}
        model.load_state_dict(given, assign=True)
    else:
        model.load_state_dict(given)
    return LoadReport(len(given), resized, _left_out(found), found.notes)


def save_teacher(path: str | os.PathLike[str], teacher: Mapping[str, Tensor], table: Mapping[str, Any]) -> None:
    """Writes `{"teacher": ..., "model": table}` as the release lays it out, and the backbone as safetensors beside it.

    Each file is written under another name and renamed, so that no reader finds half of one. Raises `DinoError` when
    the disk is full or refuses.
    """
    path = Path(path)
    teacher = {key: value.detach().cpu().contiguous() for key, value in teacher.items()}
    backbone = {key.removeprefix("backbone."): value for key, value in teacher.items() if key.startswith("backbone.")}
    files.write_whole(path, lambda file: torch.save({"teacher": teacher, "model": dict(table)}, file))
    flat = {flat_key(key): value for key, value in backbone.items()}
    files.write_tensors(path.with_name("backbone.safetensors"), flat, table)


def _found(content: Mapping[str, Any], source: str) -> _Found:
    """The backbone in a file's content, converted to the release's keys; blocks may still be in chunks."""
    state: Mapping[str, Any] = content
    for wrapper in ("teacher", "state_dict", "model"):
        below = state.get(wrapper)
        if isinstance(below, Mapping) and any(isinstance(value, Tensor) for value in below.values()):
            state = below
    tensors = {_bare(key): value for key, value in state.items() if isinstance(value, Tensor)}
    of_training = any(key.startswith(("student.", "teacher.")) for key in tensors)
    of_both = of_training and any(key.startswith("student.") for key in tensors)
    if any(key.startswith("teacher.") for key in tensors):
        tensors = {key.removeprefix("teacher."): value for key, value in tensors.items() if key.startswith("teacher.")}
    heads = tuple(key for key in tensors if key.startswith(_HEADS))
    tensors, head = split_classifier({key: value for key, value in tensors.items() if key not in heads})
    tensors = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    flattened = of_training and "cls_token" in tensors and tensors["cls_token"].ndim == 1
    if flattened or any("flat_param" in key for key in tensors):
        raise files.shard_refused(source)
    layout = layout_of(tensors)
    table = content.get("model")
    if layout is None and isinstance(table, dict) and "embed_dim" in table and "cls_token" in tensors:
        layout = "timm"  # a file of ours says what it is, also without the LayerScale that tells others apart
    if layout in ("hf", "timm"):
        tensors, notes = to_original(tensors, layout)
        return _Found(tensors, layout, head, notes, heads)
    return _Found(tensors, "training" if of_both and layout else layout, head, (), heads)


def _must_agree(table: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Refuses a table of another model before anything is built by it: its figures may be absurd."""
    n_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    width = state["cls_token"].shape[-1] if "cls_token" in state else None
    for key, held in (("depth", n_blocks), ("embed_dim", width)):
        if table.get(key, held) != held:  # what a table lacks or means otherwise is said by who builds from it
            raise WeightsError(
                f"the model table and the tensors of {source} disagree: {key} is {table.get(key)} in the one "
                f"and {held} in the other; copy the file again"
            )


def _left_out(found: _Found) -> tuple[str, ...]:
    return found.dropped + tuple(f"classifier.{key}" for key in found.head or ())


def _no_backbone(source: str, found: _Found) -> str:
    if found.head is not None or (set(found.state) <= {"weight", "bias"} and found.state):
        return f"{source} holds a linear head and no backbone; give the backbone, and this file as --head"
    if family := family_of(found.state):
        return f"{source} holds no DINOv2 backbone; it looks like {family}"
    names = ", ".join(list(found.state)[:3])
    return f"{source} holds no DINOv2 backbone{f' but {names}' if names else ''}; give a file with backbone weights"


def _bare(key: str) -> str:
    # Only at the start of a name: a parameter may well be called `...module...` further in.
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    return _WRAPPERS.sub("", key)


def _is_pair(size: Any) -> bool:
    return isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size)


def _fit_positions(
    state: dict[str, Tensor], model: DinoVisionTransformer, source: str, native: tuple[int, ...] | None
) -> tuple[str, ...]:
    """Resizes the position grid in `state` to that of the model, where they differ; what was done, for the report."""
    position = state.get("pos_embed")
    if position is None or position.ndim != 3 or position.shape[-1] != model.embed_dim or position.shape[1] < 2:
        return ()
    patches = position.shape[1] - 1
    patch = state["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in state else model.patch_size
    grid = (native[0] // patch, native[1] // patch) if native and patch else None
    if grid is None or grid[0] * grid[1] != patches:
        if position.shape == model.pos_embed.shape:
            return ()
        side = round(patches**0.5)
        if side * side != patches:
            raise WeightsError(f"{source} has a position grid of {patches} patches, which is not square")
        grid = (side, side)
    target = model.patch_embed.patches_resolution
    if grid == target:
        return ()
    state["pos_embed"] = resize_pos_embed(
        position, grid, target, offset=model.interpolate_offset, antialias=model.interpolate_antialias
    )
    return (f"pos_embed {patches} -> {model.patch_embed.num_patches} patches",)
