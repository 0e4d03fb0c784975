"""Runs that take more memory or passes than anyone means: estimated, refused in one sentence, started with --yes."""

import pytest
import torch

from dinov2.apps.train import check_training, run_training
from dinov2.configs import load_config
from dinov2.errors import ConfigError
from dinov2.train import setup
from dinov2.train.limits import estimated_memory
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.runs import pictures
from tests.train.tiny_run import tiny_config

GIB = 2**30
VITS14 = ["student.arch=vit_small", "student.patch_size=14", "crops.local_crops_size=98", "train.batch_size_per_gpu=8"]
# The training step of docs/benchmarks.md on small images.
SMALL = [
    "student.arch=vit_nano", "student.patch_size=8", "crops.global_crops_size=32", "crops.local_crops_size=16",
    "crops.local_crops_number=4", "dino.head_n_prototypes=1024", "dino.head_hidden_dim=256",
    "dino.head_bottleneck_dim=64", "dino.head_nlayers=2", "student.drop_path_rate=0.1",
]  # fmt: skip


def estimate(overrides, precision=None):
    cfg = load_config(None, overrides)
    with torch.device("meta"):
        student = SSLMetaArch(cfg).student
    return estimated_memory(cfg, student, precision) / GIB


@pytest.mark.parametrize(
    "overrides, precision, measured",
    [(SMALL, None, 0.88), (SMALL, torch.bfloat16, 0.81), (VITS14, None, 3.93), (VITS14, torch.bfloat16, 3.01)],
)
def test_the_estimate_is_within_a_fifth_of_measured_peaks(overrides, precision, measured):
    assert estimate(overrides, precision) == pytest.approx(measured, rel=0.2)


def test_the_default_configuration_on_a_laptop_is_refused_with_a_preset(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "free_memory", lambda device: 16 * GIB)
    cfg = load_config(None, [f"train.dataset_path={pictures(tmp_path / 'photos', n=15)}"])
    with pytest.raises(ConfigError) as refused:
        run_training(cfg, output_dir=tmp_path / "run", refuse_excess=True)
    text = str(refused.value)
    assert "GiB of memory, and 16.0 GiB are free (choose a preset, such as --preset cifar10" in text
    assert (
        "its 125,000 steps are 533,333 passes over 15 images (train.OFFICIAL_EPOCH_LENGTH=2 makes it about 853)" in text
    )
    assert text.endswith("add --yes to start it all the same") and "\n" not in text
    assert not (tmp_path / "run").exists()


LONG = ("train.dataset_path=toy:n=4", "train.OFFICIAL_EPOCH_LENGTH=1000")  # 3,000 passes


def test_a_resumed_run_is_not_refused(tmp_path, monkeypatch):
    cfg = tiny_config()
    run_training(cfg, output_dir=tmp_path, max_steps=2)
    monkeypatch.setattr(setup, "free_memory", lambda device: 1)
    _, outcome = run_training(cfg, output_dir=tmp_path, max_steps=4, refuse_excess=True)
    assert outcome.step == 4


def test_without_refusal_a_warning_says_the_same(tmp_path, caplog):
    cfg = tiny_config(*LONG)
    run_training(cfg, output_dir=tmp_path / "short", max_steps=1)
    assert "3,000 passes" not in caplog.text
    text = check_training(cfg, output_dir=tmp_path / "run")
    assert "this training takes a lot: its 3,000 steps are 3,000 passes over 4 images" in caplog.text
    assert "memory     about 0.7 GiB, estimated from the architecture; " in text and "3,000.0 passes" in text


def test_all_presets_are_below_the_limits_on_the_images_they_are_made_for():
    for preset, images in (("toy", 8_000), ("cifar10", 50_000)):
        cfg = load_config(None, preset=preset)
        assert cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH * cfg.train.batch_size_per_gpu / images < 1000
        assert estimate([], None) > 1 > estimated_memory(cfg, SSLMetaArch(cfg).student, None) / GIB
