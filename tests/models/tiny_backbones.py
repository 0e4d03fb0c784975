"""Small backbones with weights by recipe, and the libraries that hold the same models, for tests of layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoints.adapters import from_original
from dinov2.checkpoints.adapters.huggingface import huggingface_config, huggingface_preprocessor, with_classifier
from dinov2.checkpoints.files import write_tensors
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill

__all__ = ["all_tokens", "huggingface_folder", "tiny"]

RULES = {False: {"interpolate_offset": 0.1}, True: {"interpolate_offset": 0.0, "interpolate_antialias": True}}


def tiny(**changes: Any) -> DinoVisionTransformer:
    """64 wide, 2 blocks, one head, 7x7 patches of 14 pixels; the position rule of the releases."""
    options: dict[str, Any] = {
        "img_size": 98,
        "patch_size": 14,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 1,
        "init_values": 1.0,
        "block_chunks": 0,
        **RULES[bool(changes.get("num_register_tokens"))],
        **changes,
    }
    return fill(DinoVisionTransformer(**options)).eval()


def all_tokens(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Class token, registers and patches after the final norm, `[B, T, D]`."""
    with torch.no_grad():
        return model.norm(model.forward_features(images)["x_prenorm"])


def huggingface_folder(
    folder: Path, model: DinoVisionTransformer, *, head: dict[str, Tensor] | None = None, **config: Any
) -> Path:
    """A folder as Hugging Face lays it out; `config` overrides entries of config.json."""
    table = BackboneConfig.from_model(model)
    labels = None if head is None else [f"class {index}" for index in range(len(head["bias"]))]
    folder.mkdir(parents=True)
    state = from_original(model.state_dict(), "hf").state
    named = with_classifier(state, head, registers=bool(model.num_register_tokens))
    write_tensors(folder / "model.safetensors", named)
    (folder / "config.json").write_text(json.dumps({**huggingface_config(table, labels=labels), **config}))
    preprocessor = huggingface_preprocessor(model.patch_embed.img_size[0], patch_size=model.patch_size)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
