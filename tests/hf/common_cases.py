"""What the common checks are run on: every class of both families, and a saved folder as users have them."""

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import dinov2.hf as hf
from dinov2.hf.processing import BitImageProcessor
from tests.hf.model_cases import CLASSES, FAMILIES, images, our_model
from tests.hf.processing_cases import RELEASED, smooth_picture

__all__ = [
    "EVERY_CLASS",
    "EVERY_FAMILY",
    "LABELS",
    "backward_loss",
    "checkpoint_gradients",
    "gradients",
    "leaves",
    "our_class",
    "picture",
    "saved_folder",
    "used_parameters",
]

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_CLASS = pytest.mark.parametrize(("family", "kind"), list(itertools.product(FAMILIES, CLASSES)))

LABELS = ("cat", "dog", "owl", "yak", "zebra")


def our_class(family: str, kind: str) -> Any:
    """One of the classes of `dinov2.hf`."""
    return getattr(hf, family + kind)


def picture(height: int = 480, width: int = 640) -> Image.Image:
    """The test image by recipe."""
    return Image.fromarray(smooth_picture(height, width))


def saved_folder(folder: Path, family: str, kind: str = "ForImageClassification", **changes: Any) -> Path:
    """A random model saved with the preprocessor file of the released models; patches of 14 pixels."""
    names: dict[str, Any] = {}
    if kind == "ForImageClassification":
        pairs = dict(enumerate(LABELS))
        names = {"id2label": pairs, "label2id": {name: number for number, name in pairs.items()}}
    shape = {"image_size": 56, "patch_size": 14, **names, **changes}
    our_model(family, kind, **shape).save_pretrained(folder)
    BitImageProcessor(**RELEASED).save_pretrained(folder)
    return folder


def leaves(output: Any) -> list[Tensor]:
    """All tensors in an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in leaves(part)]
    return []


def backward_loss(model: Any, **told: Any) -> Tensor:
    """A loss that depends on all outputs: that of the labels, or the mean square of what the model gives."""
    if hasattr(model, "classifier") or hasattr(getattr(model, "base_model", None), "classifier"):
        told = {"labels": torch.tensor([1, 3]), **told}
        loss: Tensor = model(images(), **told).loss
        return loss
    return torch.stack([tensor.square().mean() for tensor in leaves(model(images(), **told))]).sum()


def gradients(model: Any, **told: Any) -> dict[str, Tensor]:
    """Gradients of `backward_loss`, of the parameters that have one."""
    model.zero_grad(set_to_none=True)
    backward_loss(model, **told).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def used_parameters(model: Any) -> set[str]:
    """Names of the parameters that a call without masks uses; a model without head does not use the mask token."""
    return {name for name, _ in model.named_parameters() if not name.endswith("mask_token")}


def checkpoint_gradients(model: Any, **options: Any) -> None:
    """Switches gradient checkpointing on by the name that every version knows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newest version has a new name for it
        model.gradient_checkpointing_enable(**options)
