"""Any weight source opened into a `Checkpoint`: the backbone under the release's keys, and all that lies beside it.

A backbone is found by its keys wherever it is nested, in dictionaries under any name, below any prefix, in every layout
of `dinov2.checkpoints.adapters`. Of several, that of a teacher or moving average is taken.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from dinov2.checkpoints.adapters import flat_key, layout_of, release_order, split_classifier, to_original
from dinov2.checkpoints.diagnostics import model_family
from dinov2.checkpoints.files import read_file, refuse_odd_tensors, shard_refused
from dinov2.checkpoints.folders import facts_beside, read_folder
from dinov2.errors import WeightsError, short_repr
from dinov2.models.config import BackboneConfig

__all__ = ["HEADS", "Checkpoint", "checkpoint_from", "no_backbone", "open_checkpoint"]

HEADS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
"""Prefixes of what a training keeps beside a backbone."""

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


@dataclass(frozen=True)
class Checkpoint:
    """A backbone as stored, under the release's flat keys, and what lies beside it."""

    state: dict[str, Tensor]
    config: BackboneConfig | None
    """Architecture as the source states it; None where only the tensors tell (`BackboneConfig.from_state_dict`)."""
    layout: Literal["original", "hf", "timm", "own", "training"] | None
    """Layout of the keys in the source; None where no backbone was recognised."""
    head: dict[str, Tensor] | None = None
    """`{"weight", "bias"}` of the linear classifier beside the backbone."""
    notes: tuple[str, ...] = ()
    """A sentence for each tensor that was made up, folded or left out."""
    dropped: tuple[str, ...] = ()
    """Keys beside the backbone: projection heads, losses, decoders."""
    files: tuple[Path, ...] = ()
    """Every file that was read."""
    source: str = "the file"
    """Name for messages: the file, and the place in it where that is not obvious."""

    def architecture(self, **known: object) -> BackboneConfig:
        """The stated architecture, else that of the tensors, with `known` values that no tensor tells."""
        return self.config or BackboneConfig.from_state_dict(self.state, source=self.source, **known)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a weight file, or a folder as Hugging Face and timm write it, in any known layout.

    Raises `WeightsError`, in one sentence, for what is missing, damaged, unsafe, no DINOv2 backbone, or a folder whose
    configuration and tensors disagree.
    """
    try:
        path = Path(path).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have
        raise WeightsError(f"there is no weight file {str(path)[:200]}; check the path") from error
    if is_folder:
        content, files, facts = read_folder(path)
    else:
        content, files = read_file(path), (path,)
        facts = None if isinstance(content.get("model"), dict) else facts_beside(path)
    checkpoint = checkpoint_from(content, str(path), n_bytes=sum(file.stat().st_size for file in files))
    if checkpoint.layout is None:
        raise no_backbone(checkpoint)
    config = checkpoint.config
    if config is None and facts is not None:
        config = facts.config(checkpoint.state, source=str(path))
    return replace(checkpoint, config=config, files=files)


def checkpoint_from(content: Mapping[str, object], source: str, *, n_bytes: int | None = None) -> Checkpoint:
    """The checkpoint in a file's content or a module's state dict; with `layout` None where it holds no backbone.

    `n_bytes` is the size of the files, beyond which a backbone cannot be. Raises `WeightsError` for shards, tensors
    that are no weights, and a `model` table of another model.
    """
    groups = list(_groups_of_tensors(content))
    if any("flat_param" in key for _, tensors in groups for key in tensors):
        raise shard_refused(source)
    places = [_Place(f"{where}{prefix}", group, prefix) for where, group in groups for prefix in _prefixes(group)]
    places = places[:_MOST_PLACES]
    fitting = sorted((place for place in places if layout_of(place.backbone())), key=_Place.rank)
    if not fitting:
        return _without_backbone(groups, places, source)
    place = fitting[0]
    tensors, head, beside = _split(place, fitting)
    name = source if place.where in ("", "backbone.", "teacher.backbone.") else f"{source} (below {place.where!r})"
    if place.rank() != 1 and "cls_token" in tensors and tensors["cls_token"].ndim == 1:
        raise shard_refused(name)
    _check_tensors(tensors, name, n_bytes)
    layout: Any = layout_of(tensors)
    others = ", ".join(repr(other.where) for other in fitting[1:3])
    notes: tuple[str, ...] = (f"backbone of {place.where!r} taken{f', and not of {others}' if others else ''}",)
    notes = notes if others or place.rank() == 2 else ()
    if layout in ("hf", "timm"):
        try:
            tensors, more = to_original(tensors, layout)
        except (RuntimeError, IndexError) as error:  # pieces that do not go together
            raise WeightsError(f"{name} has weights of shapes that no DINOv2 backbone has; copy it again") from error
        notes += more
    elif len(fitting) > 1 and fitting[-1].rank() == 2:
        layout = "training"
    if head is not None and not _reads_tokens(head, tensors["cls_token"].shape[-1]):
        beside += tuple(f"another classifier.{key}" for key in head)
        notes += ("classifier left out, it reads other features than the released ones",)
        head = None
    state = release_order({flat_key(key): value for key, value in tensors.items()})
    table = content.get("model")
    config = None
    if isinstance(table, dict) and "embed_dim" in table:
        config, layout = _config_of(table, state, source), "own"
    return Checkpoint(state, config, layout, head, notes, beside, source=name)


def no_backbone(checkpoint: Checkpoint) -> WeightsError:
    """The refusal of a source without a backbone, which says what it holds instead."""
    source, names = checkpoint.source, list(checkpoint.state)
    if checkpoint.head is not None or (names and set(names) <= {"weight", "bias"}):
        sentence = f"{source} holds a linear head and no backbone; give the backbone, and this file as --head"
    elif family := model_family(names):
        sentence = f"{source} holds no DINOv2 backbone; it looks like {family}"
    elif _ANCHORS[0] in names and (absent := [key for key in ("cls_token", "pos_embed") if key not in names]):
        sentence = f"{source} holds no DINOv2 backbone: {_ANCHORS[0]} is there and {absent[0]} is not; give a whole one"
    else:
        content = f" but {', '.join(key[:100] for key in names[:3])}" if names else ""
        sentence = f"{source} holds no DINOv2 backbone{content}; give a file with backbone weights"
    return WeightsError(sentence)


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


def _groups_of_tensors(content: Mapping[Any, object]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each dictionary of tensors in a file's content, by the names on the way to it."""
    seen: dict[int, object] = {}  # a pickle may hold a dictionary many times, also in itself
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
    """The prefix of each backbone's keys in a dictionary."""
    prefixes = [key.removesuffix(anchor) for key in tensors for anchor in _ANCHORS if key.endswith(anchor)]
    return [prefix for prefix in dict.fromkeys(prefixes) if prefix == "" or prefix.endswith(".")]


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
    heads = [key for key in tensors if key.startswith(HEADS)]
    return {key: value for key, value in tensors.items() if key not in heads}, head, (*heads, *beside)


def _without_backbone(groups: list[tuple[str, dict[str, Tensor]]], places: list[_Place], source: str) -> Checkpoint:
    """The content of the most likely place, for the message, or for models with keys of their own."""
    if places:
        return Checkpoint(places[0].backbone(), None, None, source=f"{source} (below {places[0].where!r})")
    largest = max((group for _, group in groups), key=len, default={})
    bare = {key.removeprefix("module."): value for key, value in largest.items() if not key.startswith(HEADS)}
    tensors, head = split_classifier(bare)
    return Checkpoint({flat_key(key): value for key, value in tensors.items()}, None, None, head, source=source)


def _check_tensors(tensors: Mapping[str, Tensor], source: str, n_bytes: int | None) -> None:
    """Refuse tensors that are no weights, and more of them than the files can hold."""
    if any(".lora_" in key or ".base_layer." in key for key in tensors):
        raise WeightsError(f"{source} holds adapters (LoRA) beside the weights; merge them first (merge_and_unload)")
    refuse_odd_tensors(tensors, source)
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


def _config_of(table: Mapping[str, object], state: Mapping[str, Tensor], source: str) -> BackboneConfig:
    """The architecture in a `model` table; refuses that of another model before anything is built by it."""
    held = {"depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")})}
    if state["cls_token"].ndim == 3:
        held["embed_dim"] = state["cls_token"].shape[-1]
    for key, value in held.items():
        if table.get(key, value) != value:
            raise WeightsError(
                f"the model table and the tensors of {source} disagree: {key} is {short_repr(table.get(key))} in the "
                f"one and {value} in the other; copy the file again"
            )
    config = BackboneConfig.from_table(table, source=f"the model table of {source}")
    grid, positions = [side // config.patch_size for side in config.img_size], state["pos_embed"].shape
    if len(positions) == 3 and grid[0] * grid[1] != positions[1] - 1:
        raise WeightsError(
            f"the model table and the tensors of {source} disagree: img_size makes a grid of {grid[0]}x{grid[1]} "
            f"patches and the positions are {positions[1] - 1}; copy the file again"
        )
    return config
