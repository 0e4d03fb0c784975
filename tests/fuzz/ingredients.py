"""Good files that bad ones are made of and stand beside: a tiny model, heads, pictures in class folders, lists."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dinov2.checkpoints.files import write_tensors
from dinov2.models.config import BackboneConfig
from tests.models.tiny_backbones import huggingface_folder, tiny
from tests.runs import pictures

__all__ = ["Ingredients", "chunks", "prepare"]

_CLASSES = 3


class Ingredients(NamedTuple):
    """Paths of good files, and the tensors and table of the good model."""

    folder: Path
    weights: Path
    """One safetensors file of ours."""
    release: Path
    """The same backbone as the releases are: a bare state dict in torch's format."""
    hf: Path
    """The same as a folder of Hugging Face, with a classifier."""
    head: Path
    pictures: Path
    """Six small pictures in three class folders."""
    state: dict[str, Tensor]
    table: dict[str, Any]


def chunks(count: int, *, quick: int) -> list[Any]:
    """Numbers of the shares of all cases, for `pytest.mark.parametrize`; those behind the first are slow tests."""
    return [pytest.param(chunk, marks=[pytest.mark.slow] if chunk >= quick else []) for chunk in range(count)]


def prepare(folder: Path) -> Ingredients:
    """Writes the good files into `folder`: a model 64 wide with one block, for pictures of 28 pixels."""
    model = tiny(img_size=28, depth=1)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    table = BackboneConfig.from_model(model).table()
    weights, release, head = folder / "good.safetensors", folder / "good.pth", folder / "head.pth"
    write_tensors(weights, state, table)
    torch.save(state, release)
    classifier = {"weight": torch.randn(_CLASSES, 128) / 11, "bias": torch.zeros(_CLASSES)}
    torch.save(classifier, head)
    hf = huggingface_folder(folder / "hf", model, head=classifier)
    images = pictures(folder / "pictures", n=6, classes=_CLASSES)
    return Ingredients(folder, weights, release, hf, head, images, state, table)
