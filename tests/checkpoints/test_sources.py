"""One list of sources, and every entry point that reads weights: each takes each, and the tensors are the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2 import load
from dinov2.apps.convert import convert
from dinov2.checkpoints.adapters import from_original
from dinov2.checkpoints.files import save_teacher, write_state_dict, write_tensors
from dinov2.checkpoints.open import open_checkpoint
from dinov2.cli import main
from dinov2.hub.backbones import dinov2_vits14
from dinov2.models.config import BackboneConfig
from dinov2.train.setup import load_starting_weights
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.models.tiny_backbones import huggingface_folder, tiny
from tests.train.tiny_run import tiny_config

SIZES = {"img_size": 98, "embed_dim": 64, "depth": 2, "num_heads": 1}
SOURCES = [
    "release.pth",
    "bare.pth",
    "bare.safetensors",
    "teacher.pth",
    "training_state.pth",
    "classifier.pth",
    "folder_of_hugging_face",
    "folder_of_hugging_face/model.safetensors",
    "run",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny backbone in every form."""
    folder, model = tmp_path_factory.mktemp("sources"), tiny()
    state, config = model.state_dict(), BackboneConfig.from_model(model)
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    torch.save(state, folder / "release.pth")
    write_state_dict(folder / "bare.pth", state, config.table())
    write_tensors(folder / "bare.safetensors", from_original(state, "timm").state | {"mask_token": state["mask_token"]})
    save_teacher(folder / "teacher.pth", teacher, config)
    both = {f"student.{key}": value + 1 for key, value in teacher.items()}
    torch.save(
        {"model": both | {f"teacher.{key}": value for key, value in teacher.items()}}, folder / "training_state.pth"
    )
    head = {"weight": torch.randn(3, 128), "bias": torch.zeros(3)}
    classifier = {f"backbone.{key}": value for key, value in state.items()}
    torch.save(classifier | {f"linear_head.{key}": value for key, value in head.items()}, folder / "classifier.pth")
    huggingface_folder(folder / "folder_of_hugging_face", model, head=head)
    save_teacher(folder / "run" / "eval" / "training_9" / "teacher_checkpoint.pth", teacher, config)
    return folder


def by_load(source: Path, _: Path) -> dict[str, Tensor]:
    return load(source, device="cpu", precision="fp32").backbone.state_dict()


def by_hub(source: Path, _: Path) -> dict[str, Tensor]:
    return dinov2_vits14(weights=str(source), **SIZES).state_dict()


def by_training(source: Path, _: Path) -> dict[str, Tensor]:
    sizes = ("crops.global_crops_size=98", "student.patch_size=14", f"student.pretrained_weights={source}")
    cfg = tiny_config(*sizes, "crops.local_crops_size=28", "student.num_register_tokens=0")
    ssl = SSLMetaArch(cfg)
    load_starting_weights(ssl, cfg)
    backbone = ssl.teacher["backbone"].state_dict()
    return {
        key.replace("blocks.0.0.", "blocks.0.").replace("blocks.1.1.", "blocks.1."): backbone[key] for key in backbone
    }


def by_convert(source: Path, out: Path) -> dict[str, Tensor]:
    convert(source, out / "converted.pth", to="original", without_head=True)
    return open_checkpoint(out / "converted.pth").state


def by_command(source: Path, out: Path) -> dict[str, Tensor]:
    assert main(["convert", str(source), str(out / "converted.safetensors"), "--to", "original", "--without-head"]) == 0
    return open_checkpoint(out / "converted.safetensors").state


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("entry", [by_load, by_hub, by_training, by_convert, by_command])
def test_every_entry_point_takes_every_source(folder: Path, tmp_path: Path, entry, source: str) -> None:
    expected, state = tiny().state_dict(), entry(folder / source, tmp_path)
    assert set(state) == set(expected)
    assert all(torch.equal(state[key].float(), value) for key, value in expected.items())


def test_loading_a_model_imports_neither_training_nor_losses(folder: Path) -> None:
    code = (
        "import sys, dinov2\n"
        f"dinov2.load({str(folder / 'teacher.pth')!r}, device='cpu')\n"
        "print([name for name in sys.modules if name.startswith(('dinov2.train', 'dinov2.loss'))])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "[]", ended.stderr
