"""Output of `convert`: the files of each layout, the checks of the result, and the page beside it.

Outputs are compared on a probe batch, by this package's own reading and, where it is installed, by the library that the
files are for.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinov2 import __version__
from dinov2.checkpoints.adapters import from_original, to_original
from dinov2.checkpoints.adapters.huggingface import huggingface_config, huggingface_preprocessor, with_classifier
from dinov2.checkpoints.adapters.timm import timm_config
from dinov2.checkpoints.files import read_file, write_state_dict, write_tensors, write_text_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.open import open_checkpoint
from dinov2.errors import ConfigError, DinoError, WeightsError
from dinov2.models.config import BackboneConfig
from dinov2.models.heads import LinearHead, linear_logits

__all__ = ["ConversionOrigin", "ConvertedModel", "Target", "is_file_name", "model_card", "verify", "write_target"]

Target = Literal["original", "hf", "timm"]
"""The layouts that can be written."""

# A path with one of these endings names a file, any other a folder.
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


@dataclass(frozen=True)
class ConvertedModel:
    """A model in the release's keys with its architecture, classifier and class names."""

    state: dict[str, Tensor]
    config: BackboneConfig
    head: LinearHead | None = None
    labels: Sequence[str] | None = None


def is_file_name(path: Path) -> bool:
    """Whether a path names a weight file and not a folder."""
    return path.suffix in _FILE_SUFFIXES


def write_target(model: ConvertedModel, path: Path, to: Target) -> tuple[str, ...]:
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


def _head_file(path: Path, head: LinearHead) -> Path:
    """File of the classifier of a backbone file: beside it, with the ending of the released names."""
    return path.with_name(f"{path.stem}_linear{'' if head.layers == 1 else head.layers}_head{path.suffix}")


def _write_original(model: ConvertedModel, path: Path) -> tuple[str, ...]:
    _write_file(path, from_original(model.state, "original").state, model.config)
    if model.head is not None:
        head = {key: value.contiguous() for key, value in model.head.state_dict().items()}
        _write_file(_head_file(path, model.head), head, None)
    return ()


def _write_hf(model: ConvertedModel, folder: Path) -> tuple[str, ...]:
    if is_file_name(folder):
        raise ConfigError(f"Hugging Face's layout is a folder and {folder.name} names a file; give {folder.stem}")
    if model.head is not None and model.head.layers != 1:
        raise WeightsError(
            f"this classifier reads {model.head.layers} blocks, and Hugging Face's reads tokens of the "
            "last one only; convert the 1-layer head, or give --without-head"
        )
    dtype = str(model.state["cls_token"].dtype).removeprefix("torch.")
    config = huggingface_config(model.config, labels=None if model.head is None else model.labels, dtype=dtype)
    state, notes = from_original(model.state, "hf")
    head = None if model.head is None else model.head.state_dict()
    registers = bool(model.config.num_register_tokens)
    write_tensors(folder / "model.safetensors", with_classifier(state, head, registers=registers))
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor(model.config))
    if not registers and model.config.interpolate_offset:
        size = "x".join(str(side) for side in model.config.img_size)
        notes += (
            f"positions: away from {size} pixels the stock classes resize them by another rule (no offset), and so "
            "give slightly other features than this model",
        )
    return notes


def _write_timm(model: ConvertedModel, path: Path) -> tuple[str, ...]:
    if model.head is not None:
        raise WeightsError(
            "timm's classifier reads the class token only, and this one reads the mean of the patches as well; "
            "give --without-head"
        )
    state, notes = from_original(model.state, "timm")
    # Parts that were filled in are there from now on.
    source = model.config
    converted = to_original(state, "timm").state
    held = BackboneConfig.from_state_dict(converted, img_size=source.img_size, num_heads=source.num_heads)
    config = replace(model.config, qkv_bias=held.qkv_bias, proj_bias=held.proj_bias, ffn_bias=held.ffn_bias)
    if not config.num_register_tokens and config.interpolate_offset:
        notes += ("positions: away from the native size timm resizes them by another rule (antialiased, no offset)",)
    if is_file_name(path):
        _write_file(path, state, config)
        return notes
    write_tensors(path / "model.safetensors", state, config.table())
    statistics = _preprocessor(config)
    _write_json(
        path / "config.json",
        timm_config(config, mean=statistics["image_mean"], std=statistics["image_std"]),
    )
    return notes


def _preprocessor(config: BackboneConfig) -> dict[str, Any]:
    return huggingface_preprocessor(
        config.img_size[0],
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        mean=config.mean,
        std=config.std,
    )


def _write_file(path: Path, state: dict[str, Tensor], config: BackboneConfig | None) -> None:
    write = write_tensors if path.suffix == ".safetensors" else write_state_dict
    write(path, state, None if config is None else config.table())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_text_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _transformers_view(path: Path, images: Tensor, config: BackboneConfig, has_head: bool) -> tuple[str, list[Tensor]]:
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


def _timm_view(path: Path, images: Tensor, config: BackboneConfig, has_head: bool) -> tuple[str, list[Tensor]]:
    import timm
    from timm.models import load_checkpoint

    if path.is_dir():
        model: Any = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        theirs = timm_config(config, mean=[0.0], std=[1.0])
        model = timm.create_model(theirs["architecture"], pretrained=False, **theirs["model_args"])
        load_checkpoint(model, str(path), strict=True)
    model = model.float().eval()
    with torch.inference_mode():
        return f"timm {timm.__version__}", [model.forward_features(images)]


_STOCK: dict[Target, Callable[[Path, Tensor, BackboneConfig, bool], tuple[str, list[Tensor]]]] = {
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


# Largest difference allowed, as a share of the largest output (and never of less than one).
_TOLERANCE = 1e-4
# What the files of every layout say of the architecture.
_IN_EVERY_LAYOUT = (
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_register_tokens"),
    *("ffn_layer", "interpolate_offset", "interpolate_antialias"),
)


def verify(model: ConvertedModel, staged: Path, to: Target, notes: list[str], *, ask_library: bool) -> dict[str, float]:
    """Reads the files at `staged` back and compares; the largest difference by who read them.

    Adds to `notes` what could not be compared. Raises `WeightsError` when a tensor is not accounted for, `DinoError`
    when the result says or computes something else than the source.
    """
    back = open_checkpoint(staged)
    config = back.architecture()
    _account_for_all(model.state, back.state, to)
    for key in _IN_EVERY_LAYOUT:
        said, source = getattr(config, key), getattr(model.config, key)
        if said != source:
            raise DinoError(f"the result says {key} {said}, the source {source}; nothing was written")
    head = back.head
    if model.head is not None and head is None:
        head = read_file(_head_file(staged, model.head))
    theirs = None if head is None else head_from_state(head, embed_dim=config.embed_dim, source=str(staged))
    probe = _probe(model.config)
    expected = _outputs(model.state, model.config, model.head, probe)
    returned = _outputs(back.state, config, theirs, probe)
    differences = {"read back": _agree(expected, returned, "read back")}
    if to in _STOCK and ask_library:
        # Only at the native size: elsewhere other libraries resize positions by rules of their own.
        try:
            name, seen = _STOCK[to](staged, probe[0], model.config, model.head is not None)
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


def _probe(config: BackboneConfig) -> list[Tensor]:
    """Normalised noise: at the native size, and at a small size that is not square."""
    generator = torch.Generator().manual_seed(0)
    height, width = config.img_size
    small = config.patch_size
    sizes = [(2 if max(height, width) <= 256 else 1, height, width), (1, 5 * small, 8 * small)]
    return [torch.randn(n, config.in_chans, h, w, generator=generator) for n, h, w in sizes]


def _outputs(
    state: Mapping[str, Tensor], config: BackboneConfig, head: LinearHead | None, probe: Sequence[Tensor]
) -> list[Tensor]:
    """Tokens `[B, 1+R+N, D]` (and logits) of each probe, in float32."""
    with torch.device("meta"):
        backbone = config.build()
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


_OPEN = {
    "hf": 'model = transformers.AutoModel.from_pretrained("{name}")',
    "timm": 'model = timm.create_model("local-dir:{name}", pretrained=True)',
    "original": 'model = dinov2.load("{name}")',
}


class ConversionOrigin(NamedTuple):
    """Origin of a converted model."""

    source: str
    sha256: str
    command: str
    name: str


def model_card(
    origin: ConversionOrigin,
    model: ConvertedModel,
    *,
    to: Target,
    differences: Mapping[str, float],
    notes: Sequence[str],
    name: str,
) -> str:
    """Markdown, with the header that model hubs read."""
    library = {"hf": "transformers", "timm": "timm", "original": "dinov2"}[to]
    classifier = model.head is not None
    task = "image-classification" if classifier else "image-feature-extraction"
    entry = _OPEN[to].format(name=name)
    if to == "hf" and classifier:
        entry = entry.replace("AutoModel", "AutoModelForImageClassification")
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [dinov2, vision]",
        "---",
        "",
        f"# {name}",
        "",
        f"A vision transformer of the DINOv2 kind{' with a linear classifier' if classifier else ''}, converted from "
        f"`{origin.name}`.",
        "",
        "```python",
        entry,
        "```",
        "",
        "## Where it comes from",
        "",
        f"- source: `{origin.source}`",
        f"- SHA-256 of the source's files: `{origin.sha256}`",
        f"- command: `{origin.command}`",
        f"- written by dinov2-anywhere {__version__} with torch {torch.__version__}",
        "",
        "## How it was checked",
        "",
        "Largest difference of its outputs to the source's, on a probe batch in float32:",
        "",
        *(f"- {reader}: {value:.3g}" for reader, value in differences.items()),
        "",
        *(["Notes:", "", *(f"- {note}" for note in notes), ""] if notes else []),
        "## Architecture",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {_shown(value)} |" for key, value in asdict(model.config).items()),
    ]
    if model.head is not None:
        lines.append(f"| classifier | {model.head.out_features} classes from {model.head.layers} block(s) |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return "not recorded"
    return " x ".join(str(part) for part in value) if isinstance(value, (list, tuple)) else str(value)
