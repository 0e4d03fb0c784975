"""What a converted model is written as: the files of each layout, and its own library's view of them."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinov2.checkpoints.adapters import from_original, to_original
from dinov2.checkpoints.adapters.huggingface import with_classifier
from dinov2.checkpoints.adapters.huggingface_config import config_from_table, preprocessor_from_table
from dinov2.checkpoints.adapters.timm import timm_config_from_table
from dinov2.checkpoints.files import write_state_dict, write_tensors, write_text
from dinov2.errors import ConfigError, WeightsError
from dinov2.models.heads import LinearHead
from dinov2.models.recognise import recognise

__all__ = ["FILE_SUFFIXES", "STOCK", "Target", "Whole", "head_file", "is_file_name", "write_target"]

Target = Literal["original", "hf", "timm"]
"""The layouts that can be written."""

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
"""A path with one of these names a file, any other a folder."""


@dataclass(frozen=True)
class Whole:
    """A model in the release's keys with all that belongs to it."""

    state: dict[str, Tensor]
    table: dict[str, Any]
    head: LinearHead | None = None
    labels: Sequence[str] | None = None


def is_file_name(path: Path) -> bool:
    """Whether a path names a weight file and not a folder."""
    return path.suffix in FILE_SUFFIXES


def write_target(model: Whole, path: Path, to: Target) -> tuple[str, ...]:
    """Writes the model's files at `path` (a file, or a folder that is made) and returns notes on what changed.

    Raises `WeightsError` for what the layout cannot hold, `ConfigError` for a file where a folder is needed or the
    other way round, `DinoError` for a full disk.
    """
    match to:
        case "original":
            return _write_original(model, path)
        case "hf":
            return _write_hf(model, path)
        case "timm":
            return _write_timm(model, path)


def head_file(path: Path, head: LinearHead) -> Path:
    """Where the classifier of a backbone file lies: beside it, with the ending of the released names."""
    return path.with_name(f"{path.stem}_linear{'' if head.layers == 1 else head.layers}_head{path.suffix}")


def _write_original(model: Whole, path: Path) -> tuple[str, ...]:
    _write_file(path, from_original(model.state, "original").state, model.table)
    if model.head is not None:
        head = {key: value.contiguous() for key, value in model.head.state_dict().items()}
        _write_file(head_file(path, model.head), head, None)
    return ()


def _write_hf(model: Whole, folder: Path) -> tuple[str, ...]:
    if is_file_name(folder):
        raise ConfigError(f"Hugging Face's layout is a folder and {folder.name} names a file; give {folder.stem}")
    if model.head is not None and model.head.layers != 1:
        raise WeightsError(
            f"this classifier reads {model.head.layers} blocks, and Hugging Face's reads tokens of the "
            "last one only; convert the 1-layer head, or give --without-head"
        )
    dtype = str(model.state["cls_token"].dtype).removeprefix("torch.")
    config = config_from_table(model.table, labels=None if model.head is None else model.labels, dtype=dtype)
    state, notes = from_original(model.state, "hf")
    head = None if model.head is None else model.head.state_dict()
    registers = bool(model.table["num_register_tokens"])
    write_tensors(folder / "model.safetensors", with_classifier(state, head, registers=registers))
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor_from_table(model.table))
    if not registers and model.table["interpolate_offset"]:
        size = "x".join(str(side) for side in model.table["img_size"])
        notes += (
            f"positions: away from {size} pixels the stock classes resize them by another rule (no offset), and so "
            "give slightly other features than this model",
        )
    return notes


def _write_timm(model: Whole, path: Path) -> tuple[str, ...]:
    if model.head is not None:
        raise WeightsError(
            "timm's classifier reads the class token only, and this one reads the mean of the patches as well; "
            "give --without-head"
        )
    state, notes = from_original(model.state, "timm")
    # Parts that were filled in are there from now on.
    held = recognise(to_original(state, "timm").state, **_told(model.table))
    table = {**model.table, **{key: held[key] for key in ("qkv_bias", "proj_bias", "ffn_bias")}}
    if not table["num_register_tokens"] and table["interpolate_offset"]:
        notes += ("positions: away from the native size timm resizes them by another rule (antialiased, no offset)",)
    if is_file_name(path):
        _write_file(path, state, table)
        return notes
    write_tensors(path / "model.safetensors", state, table)
    statistics = preprocessor_from_table(table)
    _write_json(
        path / "config.json",
        timm_config_from_table(table, mean=statistics["image_mean"], std=statistics["image_std"]),
    )
    return notes


def _told(table: dict[str, Any]) -> dict[str, Any]:
    return {key: table[key] for key in ("img_size", "num_heads")}


def _write_file(path: Path, state: dict[str, Tensor], table: dict[str, Any] | None) -> None:
    (write_tensors if path.suffix == ".safetensors" else write_state_dict)(path, state, table)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _transformers_view(path: Path, images: Tensor, table: dict[str, Any], has_head: bool) -> tuple[str, list[Tensor]]:
    import transformers

    auto: Any = transformers.AutoModelForImageClassification if has_head else transformers.AutoModel
    with _quiet_transformers():
        model, report = auto.from_pretrained(path, output_loading_info=True, local_files_only=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if wrong:
        raise WeightsError(f"transformers does not find its tensors in the result: {', '.join(map(str, wrong[:3]))}")
    model = model.float().eval()
    with torch.inference_mode():
        if has_head:
            tokens = model.base_model(images).last_hidden_state
            return f"transformers {transformers.__version__}", [tokens, model(images).logits]
        return f"transformers {transformers.__version__}", [model(images).last_hidden_state]


def _timm_view(path: Path, images: Tensor, table: dict[str, Any], has_head: bool) -> tuple[str, list[Tensor]]:
    import timm
    from timm.models import load_checkpoint

    if path.is_dir():
        model: Any = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        config = timm_config_from_table(table, mean=[0.0], std=[1.0])
        model = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
        load_checkpoint(model, str(path), strict=True)
    model = model.float().eval()
    with torch.inference_mode():
        return f"timm {timm.__version__}", [model.forward_features(images)]


STOCK: dict[Target, Callable[[Path, Tensor, dict[str, Any], bool], tuple[str, list[Tensor]]]] = {
    "hf": _transformers_view,
    "timm": _timm_view,
}
"""Opens a result with the library it was written for: its name with version, and its tokens (and logits) of images.

Raises `ImportError` where the library is not installed.
"""


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as their_logging

    logging: Any = their_logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
