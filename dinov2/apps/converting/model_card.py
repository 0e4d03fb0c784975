"""The page beside a model: what it is, where it comes from, and how it was checked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dinov2 import __version__
from dinov2.apps.converting.targets import Target, Whole

__all__ = ["Provenance", "model_card"]

_OPEN = {
    "hf": 'model = transformers.AutoModel.from_pretrained("{name}")',
    "timm": 'model = timm.create_model("local-dir:{name}", pretrained=True)',
    "original": 'model = dinov2.load("{name}")',
}


class Provenance(NamedTuple):
    """Where a converted model comes from."""

    source: str
    sha256: str
    command: str
    name: str


def model_card(
    origin: Provenance,
    model: Whole,
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
        *(f"| {key} | {_shown(value)} |" for key, value in model.table.items() if key != "version"),
    ]
    if model.head is not None:
        lines.append(f"| classifier | {model.head.out_features} classes from {model.head.layers} block(s) |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    return " x ".join(str(part) for part in value) if isinstance(value, (list, tuple)) else str(value)
