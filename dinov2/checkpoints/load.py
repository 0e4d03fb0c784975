"""Strict loading of a backbone, with a report."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.checkpoints.adapters import flat_key
from dinov2.checkpoints.diagnostics import explain_mismatch
from dinov2.checkpoints.open import HEADS, Checkpoint, checkpoint_from, no_backbone
from dinov2.errors import WeightsError
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["LoadReport", "check_fit", "load_into"]


class LoadReport(NamedTuple):
    """Result of a strict load, by key."""

    matched: int
    resized: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.matched} tensors loaded"]
        if self.resized:
            parts.append(f"resized: {', '.join(self.resized)}")
        of_heads = sum(key.startswith(HEADS) for key in self.dropped)
        if of_heads:
            parts.append(f"{of_heads} of projection heads left out")
        of_classifier = sum(key.startswith("classifier.") for key in self.dropped)
        if of_classifier:
            parts.append(f"{of_classifier} of a classifier left out")
        if others := len(self.dropped) - of_heads - of_classifier:
            parts.append(f"{others} of other parts left out")
        return "; ".join([*parts, *self.notes])


def load_into(
    model: DinoVisionTransformer, weights: Checkpoint | Mapping[str, object], *, source: str | os.PathLike[str] = ""
) -> LoadReport:
    """Load backbone weights strictly; only the position grid may differ, and is resized by the model's rule.

    `weights` is an opened checkpoint, or what `read_file` or a module's `state_dict` gives, in any layout; `source` is
    its name in messages. Raises `WeightsError` with the first differences and the likely cause. A model on the meta
    device gets tensors of its own.
    """
    checkpoint = weights if isinstance(weights, Checkpoint) else checkpoint_from(weights, str(source) or "the file")
    if not checkpoint.state:
        if checkpoint.head:
            raise no_backbone(checkpoint)
        raise WeightsError(f"{checkpoint.source} holds no backbone weights")
    given = dict(checkpoint.state)
    resized = _fit_positions(given, model, checkpoint)
    expected = {flat_key(key): value for key, value in model.state_dict().items()}
    if sentence := explain_mismatch(checkpoint.source, given, expected):
        raise WeightsError(sentence)
    if model.cls_token.is_meta:
        # Built without memory: it takes over tensors, of its own, for those of a file lie in the mapped file.
        given = {key: value.to(expected[key].dtype, copy=True) for key, value in given.items()}
        model.load_state_dict(given, assign=True)
    else:
        model.load_state_dict(given)
    left_out = checkpoint.dropped + tuple(f"classifier.{key}" for key in checkpoint.head or ())
    return LoadReport(len(given), resized, left_out, checkpoint.notes)


def check_fit(state: Mapping[str, Tensor], config: BackboneConfig, *, source: str) -> None:
    """Raise `WeightsError` unless backbone tensors are exactly those of the architecture, and all finite."""
    with torch.device("meta"):
        expected = config.build().state_dict()
    if sentence := explain_mismatch(source, state, expected):
        raise WeightsError(sentence)
    bad = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{len(bad)} of {len(state)} tensors of {source} hold values that are not finite (first {bad[0]}): the "
            "training that wrote it has diverged, or the file is damaged; take an earlier checkpoint"
        )


def _fit_positions(state: dict[str, Tensor], model: DinoVisionTransformer, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Resize the position grid in `state` to that of the model, where they differ; what was done, for the report."""
    position = state.get("pos_embed")
    if position is None or position.ndim != 3 or position.shape[-1] != model.embed_dim or position.shape[1] < 2:
        return ()
    patches = position.shape[1] - 1
    patch = state["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in state else model.patch_size
    native = checkpoint.config.img_size if checkpoint.config is not None else (0, 0)
    grid = (native[0] // max(patch, 1), native[1] // max(patch, 1))
    if grid[0] * grid[1] != patches:
        if position.shape == model.pos_embed.shape:
            return ()
        side = round(patches**0.5)
        if side * side != patches:
            raise WeightsError(
                f"{checkpoint.source} has a position grid of {patches} patches, which is not square, and does not say "
                "its height and width; write a file that does with: dinov2 convert FILE NEW.pth --to original "
                "--img-size HEIGHT WIDTH"
            )
        grid = (side, side)
    target = model.patch_embed.patches_resolution
    if grid == target:
        return ()
    state["pos_embed"] = resize_pos_embed(
        position, grid, target, offset=model.interpolate_offset, antialias=model.interpolate_antialias
    )
    return (f"pos_embed {patches} -> {model.patch_embed.num_patches} patches",)
