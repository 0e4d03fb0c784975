"""Whether a written model is the one it was made from: tensor by tensor, and by its outputs.

Outputs are compared on a probe batch, by this package's own reading and, where it is installed, by the library that the
files are for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.apps.converting.targets import STOCK, Target, Whole, head_file
from dinov2.checkpoints.files import read_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.open import load_into, open_weights
from dinov2.errors import DinoError, WeightsError
from dinov2.models.config import build_from_table
from dinov2.models.heads import LinearHead, linear_logits
from dinov2.models.recognise import recognise
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["verify"]

# Largest difference allowed, as a share of the largest output (and never of less than one).
_TOLERANCE = 1e-4


def verify(model: Whole, staged: Path, to: Target, notes: list[str], *, ask_library: bool) -> dict[str, float]:
    """Reads the files at `staged` back and compares; the largest difference by who read them.

    Adds to `notes` what could not be compared. Raises `WeightsError` when a tensor is not accounted for, `DinoError`
    when the result says or computes something else than the source.
    """
    back = open_weights(staged)
    table = back.table or recognise(back.state, source=str(staged))
    _account_for_all(model.state, back.state, to)
    kept = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_register_tokens")
    for key in (*kept, "ffn_layer", "interpolate_offset", "interpolate_antialias"):
        if table[key] != model.table[key]:
            raise DinoError(f"the result says {key} {table[key]}, the source {model.table[key]}; nothing was written")
    head = back.head
    if model.head is not None and head is None:
        head = read_file(head_file(staged, model.head))
    theirs = None if head is None else head_from_state(head, embed_dim=table["embed_dim"], source=str(staged))
    probe = _probe(model.table)
    expected = _outputs(model.state, model.table, model.head, probe)
    returned = _outputs(back.state, table, theirs, probe)
    differences = {"read back": _agree(expected, returned, "read back")}
    if to in STOCK and ask_library:
        # Only at the native size: elsewhere other libraries resize positions by rules of their own.
        try:
            name, seen = STOCK[to](staged, probe[0], model.table, model.head is not None)
        except ImportError:
            library = {"hf": "transformers", "timm": "timm"}[to]
            notes.append(f"not compared with {library} itself, which is not installed")
        except DinoError:
            raise
        except Exception as error:  # whatever a library of others raises, the result does not open there
            first = (str(error).splitlines() or [""])[0][:200]
            raise DinoError(
                f"the library cannot open the result ({type(error).__name__}: {first}); nothing was written; "
                "--skip-library writes it without asking"
            ) from error
        else:
            differences[name] = _agree(expected[: len(seen)], seen, name)
    return differences


def _account_for_all(source: Mapping[str, Tensor], back: Mapping[str, Tensor], to: Target) -> None:
    """Raises unless each tensor came back bit for bit, or is one that the layout folds or fills in a known way."""
    lost = [key for key in source if key not in back or not _same(key, source, back, to)]
    made_up = [key for key in back if key not in source and not _neutral(key, back[key])]
    if lost or made_up:
        raise WeightsError(
            f"not every tensor could be carried over: {', '.join([*lost, *made_up][:3])} would be lost or changed; "
            "nothing was written"
        )


def _same(key: str, source: Mapping[str, Tensor], back: Mapping[str, Tensor], to: Target) -> bool:
    if to == "timm" and key == "mask_token":
        return True
    if to == "timm" and "register_tokens" in source and key in ("cls_token", "pos_embed"):
        sums = [state["cls_token"].float() + state["pos_embed"][:, :1].float() for state in (source, back)]
        return torch.equal(*sums) and torch.equal(source["pos_embed"][:, 1:], back["pos_embed"][:, 1:])
    return torch.equal(source[key], back[key])


def _neutral(key: str, value: Tensor) -> bool:
    return bool((value == (1 if key.endswith("gamma") else 0)).all())


def _probe(table: Mapping[str, Any]) -> list[Tensor]:
    """Normalised noise: at the native size, and at a small size that is not square."""
    generator = torch.Generator().manual_seed(0)
    height, width = table["img_size"]
    small = table["patch_size"]
    sizes = [(2 if max(height, width) <= 256 else 1, height, width), (1, 5 * small, 8 * small)]
    return [torch.randn(n, table["in_chans"], h, w, generator=generator) for n, h, w in sizes]


def _outputs(
    state: Mapping[str, Tensor], table: Mapping[str, Any], head: LinearHead | None, probe: Sequence[Tensor]
) -> list[Tensor]:
    """Tokens `[B, 1+R+N, D]` (and logits) of each probe, in float32."""
    with torch.device("meta"):
        backbone: DinoVisionTransformer = build_from_table(table)
    load_into(backbone, {key: value.float() for key, value in state.items()})
    backbone.eval()
    outputs = []
    with torch.inference_mode():
        for images in probe:
            outputs.append(backbone.norm(backbone.forward_features(images)["x_prenorm"]))
            if head is not None:
                outputs.append(linear_logits(backbone, head, images))
    return outputs


def _agree(expected: Sequence[Tensor], seen: Sequence[Tensor], reader: str) -> float:
    largest = 0.0
    for ours, theirs in zip(expected, seen, strict=True):
        if ours.shape != theirs.shape:
            raise DinoError(f"{reader} gives {list(theirs.shape)}, the source {list(ours.shape)}; nothing was written")
        difference = float((ours - theirs).abs().max())
        scale = max(float(ours.abs().max()), 1.0)
        if not difference <= _TOLERANCE * scale:  # also refuses what is no number
            raise DinoError(f"{reader} differs from the source by {difference:.2g}; nothing was written")
        largest = max(largest, difference)
    return largest
