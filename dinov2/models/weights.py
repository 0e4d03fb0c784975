"""Backbone weights in files: read safely, recognised, loaded strictly with a report, written with their architecture.

Files written here carry a `model` table (architecture, position rule, normalisation), so that nobody has to remember
with which options they were trained. Pickles are read through `weights_only`: a file with code in it is refused.
"""

import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DinoError, WeightsError
from dinov2.layers.pos_embed import resize_pos_embed
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "LoadReport",
    "backbone_state",
    "build_from_table",
    "load_into",
    "model_table",
    "ratio_for",
    "read_file",
    "save_teacher",
]

_TABLE_VERSION = 1
_HEADS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
# A zip archive, or the pickle of torch before 1.6: everything else is a download gone wrong.
_FILE_STARTS = (b"PK", b"\x80")


class LoadReport(NamedTuple):
    """What a strict load did, by key."""

    matched: int
    resized: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.matched} tensors loaded"]
        if self.resized:
            parts.append(f"resized: {', '.join(self.resized)}")
        if self.dropped:
            parts.append(f"{len(self.dropped)} of projection heads left out")
        return "; ".join(parts)


def model_table(model: DinoVisionTransformer, *, mean: Any = None, std: Any = None) -> dict[str, Any]:
    """Plain values from which `build_from_table` makes the same architecture again."""
    block: Any = model.block_list[0]
    gated = hasattr(block.mlp, "w12")
    hidden = block.mlp.w12.out_features // 2 if gated else getattr(getattr(block.mlp, "fc1", None), "out_features", 0)
    feed_forward = "swiglufused" if gated else "mlp" if hidden else "identity"
    return {
        "version": _TABLE_VERSION,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": model.patch_size,
        "in_chans": model.patch_embed.in_chans,
        "embed_dim": model.embed_dim,
        "depth": model.n_blocks,
        "num_heads": model.num_heads,
        "mlp_ratio": ratio_for(hidden * 3 // 2 if gated else hidden, model.embed_dim) if hidden else 4.0,
        "ffn_layer": feed_forward,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "ffn_bias": _last_linear_has_bias(block.mlp),
        "layerscale": hasattr(block.ls1, "gamma"),
        "num_register_tokens": model.num_register_tokens,
        "interpolate_offset": model.interpolate_offset,
        "interpolate_antialias": model.interpolate_antialias,
        "mean": list(mean) if mean is not None else None,
        "std": list(std) if std is not None else None,
    }


def ratio_for(hidden: int, width: int) -> float:
    """The `mlp_ratio` with which a transformer of that width gets exactly `hidden` features."""
    ratio = hidden / width
    # The product is cut, not rounded: 61 / 448 * 448 falls just short of 61.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def build_from_table(table: Mapping[str, Any]) -> DinoVisionTransformer:
    """A fresh model of the architecture in a `model` table; blocks in a flat list.

    Raises `WeightsError` for a table of another version, or one that describes no model.
    """
    if table.get("version") != _TABLE_VERSION:
        raise WeightsError(
            f"the model table of this file has version {table.get('version')}, this package reads {_TABLE_VERSION}; "
            "update the package"
        )
    names = "patch_size in_chans embed_dim depth num_heads mlp_ratio ffn_layer qkv_bias proj_bias ffn_bias"
    names += " num_register_tokens interpolate_offset interpolate_antialias"
    try:
        return DinoVisionTransformer(
            img_size=tuple(table["img_size"]),
            init_values=1.0 if table["layerscale"] else None,
            block_chunks=0,
            **{name: table[name] for name in names.split()},
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AssertionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise WeightsError(
            f"the model table of this file describes no model ({reason}); copy the file again"
        ) from error


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `.pth` or `.safetensors` file on the CPU; a safetensors file's `model` table is decoded.

    Raises `WeightsError` for a file that is missing, truncated, no weight file at all, or that holds code.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; give the weight file in it, such as a teacher_checkpoint.pth")
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}; check the path")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except WeightsError:
        raise
    except PermissionError as error:
        raise WeightsError(
            f"the weight file {path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    except Exception as error:  # damaged bytes make the readers raise whatever comes first
        raise _no_weight_file(path) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _read_torch(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(2)
    if not start.startswith(_FILE_STARTS):
        raise _no_weight_file(path)
    try:
        with warnings.catch_warnings():
            # Pickle protocols that torch does not write itself: what matters is said by the error, if there is one.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The same error stands for a refused class and for damaged bytes; torch names the former. Pickles that torch
        # did not write use operations that it does not know.
        if "GLOBAL" not in str(error) and (start == b"PK" or "Unsupported" not in str(error)):
            raise
        raise WeightsError(
            f"{path} holds Python objects besides tensors and was refused, because loading them could run code; "
            "ask its author for a plain state dict"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        content: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        table = (file.metadata() or {}).get("model", "")
    if table.startswith("{"):  # files of others may say something else under that key
        content["model"] = json.loads(table)
    return content


def _no_weight_file(path: Path) -> WeightsError:
    return WeightsError(f"{path} is no weight file (or only a part of one); download or copy it again")


def backbone_state(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Backbone tensors under bare keys, and the keys of projection heads that were left out.

    Takes released files, teacher files (`teacher` or `backbone.` prefixes) and training states (`student.`, `teacher.`,
    of which the teacher is used), also below `state_dict` or `model`.
    """
    state: Mapping[str, Any] = content
    for wrapper in ("teacher", "state_dict", "model"):
        below = state.get(wrapper)
        if isinstance(below, Mapping) and any(isinstance(value, Tensor) for value in below.values()):
            state = below
    tensors = {_bare(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.startswith("teacher.") for key in tensors):
        tensors = {key.removeprefix("teacher."): value for key, value in tensors.items() if key.startswith("teacher.")}
    heads = tuple(key for key in tensors if key.startswith(_HEADS))
    return {key.removeprefix("backbone."): value for key, value in tensors.items() if key not in heads}, heads


def load_into(model: DinoVisionTransformer, content: Mapping[str, Any], *, source: str = "the file") -> LoadReport:
    """Loads backbone weights strictly; only the position grid may differ, and is resized.

    Raises `WeightsError` with the first differences and the likely cause.
    """
    state, heads = backbone_state(content)
    if not state:
        raise WeightsError(f"{source} holds no backbone weights")
    resized: tuple[str, ...] = ()
    position = state.get("pos_embed")
    if position is not None and position.shape != model.pos_embed.shape and position.shape[-1] == model.embed_dim:
        state["pos_embed"] = _resized(position, model, source)
        resized = (f"pos_embed {position.shape[1] - 1} -> {model.patch_embed.num_patches} patches",)
    expected = {_flat(key): value for key, value in model.state_dict().items()}
    given = {_flat(key): value for key, value in state.items()}
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key} is {list(given[key].shape)}, wanted {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    if missing or unexpected or shapes:
        raise WeightsError(_refusal(source, missing, unexpected, shapes))
    model.load_state_dict(state)
    return LoadReport(len(given), resized, heads)


def save_teacher(path: str | os.PathLike[str], teacher: Mapping[str, Tensor], table: Mapping[str, Any]) -> None:
    """Writes `{"teacher": ..., "model": table}` as the release lays it out, and the backbone as safetensors beside it.

    Each file is written under another name and renamed, so that no reader finds half of one. Raises `DinoError` when
    the disk is full or refuses.
    """
    from safetensors.torch import save_file

    path = Path(path)
    teacher = {key: value.detach().cpu().contiguous() for key, value in teacher.items()}
    backbone = {key.removeprefix("backbone."): value for key, value in teacher.items() if key.startswith("backbone.")}
    flat = {_flat(key): value.clone() for key, value in backbone.items()}
    metadata = {"format": "pt", "model": json.dumps(table)}
    _write_whole(path, lambda file: torch.save({"teacher": teacher, "model": dict(table)}, file))
    _write_whole(path.with_name("backbone.safetensors"), lambda file: save_file(flat, file, metadata=metadata))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    from safetensors import SafetensorError

    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        # safetensors makes files that only their owner may read; a result is for whoever may read the folder.
        unfinished.chmod(0o666 & ~_umask())
        os.replace(unfinished, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of both formats have errors of their own
        with suppress(OSError):
            unfinished.unlink()
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise DinoError(f"{path} could not be written ({reason}); free some space there and start again") from error


def _bare(key: str) -> str:
    # Only at the start of a name: a parameter may well be called `...module...` further in.
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    return key


def _flat(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit() and parts[2].isdigit():
        del parts[1]
    return ".".join(parts)


def _resized(position: Tensor, model: DinoVisionTransformer, source: str) -> Tensor:
    side = round((position.shape[1] - 1) ** 0.5)
    if side * side != position.shape[1] - 1:
        raise WeightsError(f"{source} has a position grid of {position.shape[1] - 1} patches, which is not square")
    return resize_pos_embed(
        position,
        (side, side),
        model.patch_embed.patches_resolution,
        offset=model.interpolate_offset,
        antialias=model.interpolate_antialias,
    )


def _refusal(source: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    differences = [f"missing {key}" for key in missing] + [f"unexpected {key}" for key in unexpected] + shapes
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{source} does not fit this model: {'; '.join(differences[:3])}{more}. {_likely_cause(missing, unexpected)}"


def _likely_cause(missing: list[str], unexpected: list[str]) -> str:
    if unexpected == ["register_tokens"] and not missing:
        return "The file is of a model with registers: set student.num_register_tokens."
    if missing == ["register_tokens"] and not unexpected:
        return "The file is of a model without registers: set student.num_register_tokens=0."
    if any(".mlp.w12." in key for key in unexpected) or any(".mlp.w12." in key for key in missing):
        return "One of the two has a SwiGLU feed-forward network: check student.ffn_layer."
    if set(unexpected) <= {"weight", "bias"} and unexpected:
        return "The file looks like a linear head, not a backbone."
    in_blocks = [key for key in unexpected + missing if key.startswith("blocks.")]
    if any(key.endswith(".norm1.weight") for key in in_blocks):
        return "The depths differ: check student.arch."
    if any(key.endswith(".ls1.gamma") for key in in_blocks):
        return "One of the two has no LayerScale: check student.layerscale."
    if in_blocks:
        return "Check student.ffn_layer, qkv_bias, proj_bias and ffn_bias."
    if missing == ["mask_token"]:
        return "The file is of a vision transformer that was trained by another method."
    return "Check student.arch, patch_size and in_chans."


def _last_linear_has_bias(feed_forward: Any) -> bool:
    last = getattr(feed_forward, "w3", getattr(feed_forward, "fc2", None))
    return last is None or last.bias is not None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
