"""State-dict adapters: names that other libraries give to the same tensors, and back.

- *original*: the release's keys, which are the attribute names of `dinov2.models.vision_transformer`;
- *hf*: the files of Hugging Face's `dinov2` and `dinov2_with_registers`, and the names that its classes have had in
  memory since version 5.18 (`q_proj`, `gate_proj`, ...);
- *timm*: `vit_*_patch14_dinov2`. It has no mask token, and its models with registers hold the sum of class token and
  class position. On the way back the mask token becomes zeros, and the sum stays in the class token with a position of
  zero: the outputs are the same.

A key that a map does not know stays as it is, so that a strict load names it.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from dinov2.checkpoints.adapters.huggingface import from_huggingface, to_huggingface, without_prefix
from dinov2.checkpoints.adapters.timm import from_timm, to_timm

__all__ = [
    "Converted",
    "KeyLayout",
    "flat_key",
    "from_original",
    "layout_of",
    "release_order",
    "split_classifier",
    "to_original",
]

KeyLayout = Literal["original", "hf", "timm"]
"""Whose names the keys are."""

_ORDER = ["norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3", "ls2"]
_TOP_ORDER = ["cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj"]
_CLASSIFIERS = ("linear_head.", "classifier.")
# Nine digits at most: Python does not turn thousands of them into a number, and `\d` means those of every script.
_BLOCK_KEY = re.compile(r"blocks\.(?:[0-9]{1,9}\.)?([0-9]{1,9})\.(.+)")
_CHUNKED_KEY = re.compile(r"^blocks\.[0-9]{1,9}\.([0-9]{1,9})\.(?![0-9])")


class Converted(NamedTuple):
    """Tensors under other keys, and a sentence for each that was made up, folded or left out."""

    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def layout_of(state: Mapping[str, Tensor]) -> KeyLayout | None:
    """Whose names the bare keys of a backbone are; None for a model of another kind."""
    names = {without_prefix(key) for key in state}
    if "embeddings.patch_embeddings.projection.weight" in names and "encoder.layer.0.layer_scale1.lambda1" in names:
        return "hf"
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= names:
        return None
    # Without a mask token a file is timm's, or one from which it was taken out: a strict load tells whether it fits.
    return "timm" if "reg_token" in names or "mask_token" not in names else "original"


def to_original(state: Mapping[str, Tensor], layout: KeyLayout) -> Converted:
    """The tensors of a backbone in `layout` under the release's flat keys, in the release's order."""
    match layout:
        case "hf":
            converted = Converted(*from_huggingface(state))
        case "timm":
            converted = Converted(*from_timm({flat_key(key): value for key, value in state.items()}))
        case "original":
            converted = Converted({flat_key(key): value for key, value in state.items()})
    return Converted(release_order(converted.state), converted.notes)


def from_original(state: Mapping[str, Tensor], layout: KeyLayout) -> Converted:
    """Backbone tensors under the release's keys in another `layout`; values that the release leaves out are filled in.

    Raises `WeightsError` for a model that the other side has no name for.
    """
    flat = release_order({flat_key(key): value for key, value in state.items()})
    match layout:
        case "hf":
            return Converted(*to_huggingface(flat))
        case "timm":
            return Converted(*to_timm(flat))
        case "original":
            return Converted(flat)


def split_classifier(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """A backbone's tensors, and `{"weight", "bias"}` of the linear classifier among them, or None."""
    for prefix in _CLASSIFIERS:
        head = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if head:
            return {key: value for key, value in state.items() if not key.startswith(prefix)}, head
    return dict(state), None


def flat_key(key: str) -> str:
    """`blocks.<chunk>.<index>.` of training files as `blocks.<index>.`; other keys as they are."""
    return _CHUNKED_KEY.sub(r"blocks.\1.", key)


def release_order(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the order of the released files; unknown ones at the end."""

    def place(key: str) -> tuple[int, int, int, str]:
        if match := _BLOCK_KEY.fullmatch(key):
            part = next((i for i, name in enumerate(_ORDER) if match[2].startswith(f"{name}.")), len(_ORDER))
            return 1, int(match[1]), part, "" if key.endswith(".weight") else key
        top = next((i for i, name in enumerate(_TOP_ORDER) if key.startswith(name)), None)
        if top is not None:
            return 0, top, 0, "" if key.endswith(".weight") else key
        return (2 if key.startswith("norm.") else 3), 0, 0, "" if key.endswith(".weight") else key

    return {key: state[key] for key in sorted(state, key=place)}
