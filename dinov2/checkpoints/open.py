"""Backbones found in whatever holds them, and loaded strictly with a report.

`open_weights` reads a file or a folder; `load_into` puts tensors into a model and refuses anything that does not fit.
Both know the layouts of `dinov2.checkpoints.adapters` and find a backbone by its keys wherever it is nested: in
dictionaries under any name, below any prefix. Of several, that of a teacher or moving average is taken.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinov2.checkpoints import files
from dinov2.checkpoints.adapters import flat_key, layout_of, release_order, split_classifier, to_original
from dinov2.checkpoints.diagnostics import family_of, refusal
from dinov2.checkpoints.folders import facts_beside, read_folder
from dinov2.errors import WeightsError, short_repr
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.models.config import BackboneConfig, build_from_table
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "LoadReport",
    "OpenedWeights",
    "backbone_state",
    "check_fit",
    "load_into",
    "open_weights",
    "save_teacher",
]


_HEADS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
# What wrappers of modules leave in the middle of a name.
_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# Keys by which a backbone is found; what stands before them is its prefix.
_ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
# Words in the place of a backbone that say which of several it is.
_AVERAGED = {"teacher", "ema", "momentum", "target", "shadow", "averaged", "swa"}
_TRAINED = {"student", "online", "query"}
_DEEPEST = 8
_MOST_PLACES = 100
# Small models may repeat numbers; the bytes of larger ones must lie in their files.
_LARGEST_CLAIM = 1 << 28


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
        of_classifier = sum(key.startswith("classifier.") for key in self.dropped)
        if of_classifier:
            parts.append(f"{of_classifier} of a classifier left out")
        if others := len(self.dropped) - of_heads - of_classifier:
            parts.append(f"{others} of other parts left out")
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
    """Keys of what lay beside the backbone: projection heads, losses, decoders."""


class _Place(NamedTuple):
    """A backbone in the content of a file: the dictionary that holds it, and the prefix of its keys there."""

    where: str
    """Names of the dictionaries on the way and the prefix, as `teacher.backbone.`."""
    tensors: Mapping[str, Tensor]
    """All tensors of the dictionary."""
    prefix: str

    def backbone(self) -> dict[str, Tensor]:
        """The tensors below the prefix."""
        return {key.removeprefix(self.prefix): self.tensors[key] for key in self.tensors if key.startswith(self.prefix)}

    def rank(self) -> int:
        """0 for a teacher or a moving average, 2 for a student, 1 for anything else."""
        words = set(re.split(r"[._\d]+", self.where.lower()))
        return 0 if words & _AVERAGED else 2 if words & _TRAINED else 1


class _Found(NamedTuple):
    state: dict[str, Tensor]
    layout: Literal["original", "hf", "timm", "training"] | None
    head: dict[str, Tensor] | None
    notes: tuple[str, ...]
    dropped: tuple[str, ...]
    source: str
    """The file, and the place in it where that is not obvious."""


def open_weights(path: str | os.PathLike[str]) -> OpenedWeights:
    """Reads a weight file, or a folder as Hugging Face and timm write it, in any layout this package knows.

    Raises `WeightsError`, in one sentence, for what is missing, damaged, unsafe, no DINOv2 backbone, or a folder whose
    configuration and tensors disagree.
    """
    try:
        path = Path(path).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have
        raise WeightsError(f"there is no weight file {str(path)[:200]}; check the path") from error
    if is_folder:
        content, read, facts = read_folder(path)
    else:
        content, read = files.read_file(path), (path,)
        facts = None if isinstance(content.get("model"), dict) else facts_beside(path)
    found = _found(content, str(path), n_bytes=sum(file.stat().st_size for file in read))
    if found.layout is None:
        raise WeightsError(_no_backbone(found))
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


def check_fit(state: Mapping[str, Tensor], table: Mapping[str, Any], *, source: str) -> None:
    """Raises `WeightsError` unless backbone tensors are exactly those of the model in a table, and all finite."""
    with torch.device("meta"):
        expected = build_from_table(table).state_dict()
    if sentence := refusal(source, state, expected):
        raise WeightsError(sentence)
    bad = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{len(bad)} of {len(state)} tensors of {source} hold values that are not finite (first {bad[0]}): the "
            "training that wrote it has diverged, or the file is damaged; take an earlier checkpoint"
        )


def load_into(model: DinoVisionTransformer, content: Mapping[str, Any], *, source: str = "the file") -> LoadReport:
    """Loads backbone weights strictly; only the position grid may differ, and is resized by the model's rule.

    `content` is what `read_file` or a module's `state_dict` gives, in any layout. Raises `WeightsError` with the first
    differences and the likely cause. A model on the meta device gets tensors of its own.
    """
    found = _found(content, source)
    if not found.state:
        raise WeightsError(_no_backbone(found) if found.head else f"{source} holds no backbone weights")
    given = {flat_key(key): value for key, value in found.state.items()}
    table = content.get("model")
    native = tuple(table["img_size"]) if isinstance(table, dict) and _is_pair(table.get("img_size")) else None
    resized = _fit_positions(given, model, found.source, native)
    expected = {flat_key(key): value for key, value in model.state_dict().items()}
    if sentence := refusal(found.source, given, expected):
        raise WeightsError(sentence)
    if model.cls_token.is_meta:
        # Built without memory: it takes over tensors, of its own, for those of a file lie in the mapped file.
        given = {key: value.to(expected[key].dtype, copy=True) for key, value in given.items()}
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
    files.write_teacher(path, teacher, table)
    flat = {flat_key(key): value for key, value in backbone.items()}
    files.write_tensors(path.with_name("backbone.safetensors"), flat, table)


def _found(content: Mapping[str, Any], source: str, *, n_bytes: int | None = None) -> _Found:
    """The backbone in a file's content, converted to the release's keys; blocks may still be in chunks.

    `n_bytes` is the size of the files, beyond which a backbone cannot be.
    """
    groups = list(_groups_of_tensors(content))
    if any("flat_param" in key for _, tensors in groups for key in tensors):
        raise files.shard_refused(source)
    places = [_Place(f"{where}{prefix}", group, prefix) for where, group in groups for prefix in _prefixes(group)]
    places = places[:_MOST_PLACES]
    fitting = sorted((place for place in places if layout_of(place.backbone())), key=_Place.rank)
    if not fitting:
        return _nothing_found(groups, places, source)
    place = fitting[0]
    tensors, head, beside = _split(place, fitting)
    source = source if place.where in ("", "backbone.", "teacher.backbone.") else f"{source} (below {place.where!r})"
    if place.rank() != 1 and "cls_token" in tensors and tensors["cls_token"].ndim == 1:
        raise files.shard_refused(source)
    _check_tensors(tensors, source, n_bytes)
    layout: Any = layout_of(tensors)
    others = ", ".join(repr(other.where) for other in fitting[1:3])
    notes: tuple[str, ...] = (f"backbone of {place.where!r} taken{f', and not of {others}' if others else ''}",)
    notes = notes if others or place.rank() == 2 else ()
    if layout in ("hf", "timm"):
        try:
            tensors, more = to_original(tensors, layout)
        except (RuntimeError, IndexError) as error:  # pieces that do not go together
            raise WeightsError(f"{source} has weights of shapes that no DINOv2 backbone has; copy it again") from error
        notes += more
    elif len(fitting) > 1 and fitting[-1].rank() == 2:
        layout = "training"
    if head is not None and not _reads_tokens(head, tensors["cls_token"].shape[-1]):
        beside += tuple(f"another classifier.{key}" for key in head)
        notes += ("classifier left out, it reads other features than the released ones",)
        head = None
    return _Found(dict(tensors), layout, head, notes, beside, source)


def _groups_of_tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each dictionary of tensors in a file's content, by the names on the way to it."""
    seen: dict[int, Any] = {}  # a pickle may hold a dictionary many times, also in itself
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    while waiting:
        where, holder, depth = waiting.pop(0)
        if id(holder) in seen or depth > _DEEPEST:
            continue
        seen[id(holder)] = holder
        items = list(holder.items() if isinstance(holder, Mapping) else enumerate(holder))
        tensors = {_WRAPPERS.sub("", key): v for key, v in items if isinstance(key, str) and isinstance(v, Tensor)}
        if tensors:
            yield where, tensors
        for key, value in items:
            if isinstance(value, Mapping | list | tuple):
                name = key if isinstance(key, str) else short_repr(key)
                waiting.append((f"{where}{name}.", value, depth + 1))


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """What stands before the keys of each backbone in a dictionary."""
    found = [key.removesuffix(anchor) for key in tensors for anchor in _ANCHORS if key.endswith(anchor)]
    return [prefix for prefix in dict.fromkeys(found) if prefix == "" or prefix.endswith(".")]


def _split(place: _Place, others: list[_Place]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, tuple[str, ...]]:
    """The tensors of a backbone, the classifier on top of it, and the keys of what lies beside them."""
    parent = place.prefix[: place.prefix.removesuffix(".").rfind(".") + 1]
    taken = tuple(other.prefix for other in others if other.tensors is place.tensors and other.prefix)
    beside = {
        key.removeprefix(parent): value
        for key, value in place.tensors.items()
        if place.prefix and key.startswith(parent) and not key.startswith(taken)
    }
    tensors, head = split_classifier(place.backbone())
    if head is None:
        beside, head = split_classifier(beside)
    heads = [key for key in tensors if key.startswith(_HEADS)]
    dropped = (*heads, *beside)
    return {key: value for key, value in tensors.items() if key not in heads}, head, dropped


def _nothing_found(groups: list[tuple[str, dict[str, Tensor]]], places: list[_Place], source: str) -> _Found:
    """What stands in the most likely place, for the message, or for models with keys of their own."""
    if places:
        return _Found(places[0].backbone(), None, None, (), (), f"{source} (below {places[0].where!r})")
    largest = max((group for _, group in groups), key=len, default={})
    bare = {key.removeprefix("module."): value for key, value in largest.items() if not key.startswith(_HEADS)}
    tensors, head = split_classifier(bare)
    return _Found(tensors, None, head, (), (), source)


def _check_tensors(tensors: Mapping[str, Tensor], source: str, n_bytes: int | None) -> None:
    """Refuses tensors that are no weights, and more of them than the files can hold."""
    if any(".lora_" in key or ".base_layer." in key for key in tensors):
        raise WeightsError(f"{source} holds adapters (LoRA) beside the weights; merge them first (merge_and_unload)")
    files.refuse_odd_tensors(tensors, source)
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if n_bytes is not None and claimed > max(n_bytes, _LARGEST_CLAIM):
        raise WeightsError(
            f"the tensors of {source} claim {claimed:,} bytes and its files have {n_bytes:,}; ask its author for "
            "another one"
        )


def _reads_tokens(head: Mapping[str, Tensor], embed_dim: int) -> bool:
    weight, bias = head.get("weight"), head.get("bias")
    fits = weight is not None and weight.ndim == 2 and weight.shape[1] in (2 * embed_dim, 5 * embed_dim)
    return fits and bias is not None and set(head) == {"weight", "bias"}


def _must_agree(table: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Refuses a table of another model before anything is built by it."""
    n_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    sides, patch = table.get("img_size"), table.get("patch_size")
    held: dict[str, Any] = {"depth": n_blocks}
    if state["cls_token"].ndim == 3:
        held["embed_dim"] = state["cls_token"].shape[-1]
    for key, value in held.items():
        if table.get(key, value) != value:  # what a table lacks or means otherwise is said by who builds from it
            raise WeightsError(
                f"the model table and the tensors of {source} disagree: {key} is {short_repr(table.get(key))} in the "
                f"one and {value} in the other; copy the file again"
            )
    BackboneConfig.from_table(table, source=f"the model table of {source}")
    assert isinstance(sides, list | tuple) and isinstance(patch, int)
    grid, positions = [side // patch for side in sides], state["pos_embed"].shape
    if len(positions) == 3 and grid[0] * grid[1] != positions[1] - 1:
        raise WeightsError(
            f"the model table and the tensors of {source} disagree: img_size makes a grid of {grid[0]}x{grid[1]} "
            f"patches and the positions are {positions[1] - 1}; copy the file again"
        )


def _left_out(found: _Found) -> tuple[str, ...]:
    return found.dropped + tuple(f"classifier.{key}" for key in found.head or ())


def _no_backbone(found: _Found) -> str:
    source, names = found.source, ", ".join(key[:100] for key in list(found.state)[:3])
    if found.head is not None or (set(found.state) <= {"weight", "bias"} and found.state):
        return f"{source} holds a linear head and no backbone; give the backbone, and this file as --head"
    if family := family_of(found.state):
        return f"{source} holds no DINOv2 backbone; it looks like {family}"
    absent = [key for key in ("cls_token", "pos_embed") if key not in found.state]
    if _ANCHORS[0] in found.state and absent:
        return f"{source} holds no DINOv2 backbone: {_ANCHORS[0]} is there and {absent[0]} is not; give a whole one"
    return f"{source} holds no DINOv2 backbone{f' but {names}' if names else ''}; give a file with backbone weights"


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
            raise WeightsError(
                f"{source} has a position grid of {patches} patches, which is not square, and does not say its height "
                "and width; write a file that does with: dinov2 convert FILE NEW.pth --to original --img-size HEIGHT "
                "WIDTH"
            )
        grid = (side, side)
    target = model.patch_embed.patches_resolution
    if grid == target:
        return ()
    state["pos_embed"] = resize_pos_embed(
        position, grid, target, offset=model.interpolate_offset, antialias=model.interpolate_antialias
    )
    return (f"pos_embed {patches} -> {model.patch_embed.num_patches} patches",)
