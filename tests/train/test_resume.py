"""A killed run, resumed, equals the unbroken one bit for bit: weights, teacher, centers, moments and logged losses.

On the CPU, with one thread. Every life of a run is a process that SIGKILL ends at a chosen moment (`lives.py`).
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.lives import Moment, NthFileOperation, equals, live, remains

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked and end by SIGKILL")

KILLED = -signal.SIGKILL
# All that a step draws and remembers: stochastic depth, masks, both heads, centers. Teachers after steps 4, 8 and 12.
EVERYTHING = (
    "student.drop_path_rate=0.3",
    "train.centering=centering",
    "ibot.loss_weight=1",
    "ibot.separate_head=true",
    "ibot.mask_sample_probability=0.5",
    "ibot.head_n_prototypes=32",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
    "evaluation.eval_period_iterations=4",
)
STEP = "dinov2.train.train:guarded_step"
TEACHER = "dinov2.train.ssl_meta_arch:SSLMetaArch.update_teacher"
SAVE = "dinov2.train.train:_save"
TENSORS = "dinov2.engine.checkpoint:_write_tensors"
COMPLETE = "dinov2.engine.checkpoint:CheckpointStore._complete"
TEXT = "dinov2.engine.checkpoint:_write_synced"
DROP = "dinov2.engine.checkpoint:CheckpointStore._drop_oldest"
EXPORT = "dinov2.train.train:_export_teacher"
ROW = "dinov2.engine.metrics:MetricsWriter.write"
CUT_BACK = "dinov2.engine.metrics:MetricsWriter.cut_back"

BETWEEN_NETWORKS = Moment(((TEACHER, 5),))
HALF_THE_TENSORS = Moment(((TENSORS, 2), ("os:fsync", 1)), "halfway")
# Checkpoints are saved after steps 3, 6, 9 and 12, the oldest of them dropped in the fourth save.
LIVES = {
    "in the first step, before any checkpoint": [Moment(((STEP, 1),))],
    "in a step, with gradients that nobody used": [Moment(((STEP, 5),))],
    "in a step, between student and teacher": [BETWEEN_NETWORKS],
    # The first row after a checkpoint: no whole row needs to go, the half one does.
    "while a row of metrics is written": [Moment(((ROW, 4),), "halfway")],
    "between the metrics and the checkpoint of a step": [Moment(((SAVE, 2),))],
    "while the tensors of the first save are written": [Moment(((TENSORS, 1), ("os:fsync", 1)), "halfway")],
    "while the tensors of a later save are written": [HALF_THE_TENSORS],
    "in a save, when the tensors are written": [Moment(((TENSORS, 2),), "after")],
    "in a save, between values and table of contents": [Moment(((COMPLETE, 2), (TEXT, 2)))],
    "in a save, while the table of contents is written": [
        Moment(((COMPLETE, 2), (TEXT, 2), ("os:fsync", 1)), "halfway")
    ],
    "in a save, before the rename": [Moment(((COMPLETE, 2), ("os:rename", 1)))],
    "in a save, after the rename": [Moment(((COMPLETE, 2), ("os:rename", 1)), "after")],
    "in the last save, while the oldest is removed": [Moment(((DROP, 4), ("os:unlink", 1)), "after")],
    "in the teacher's export, before its first file": [Moment(((EXPORT, 2), ("os:replace", 1)))],
    "in the teacher's export, between its files": [Moment(((EXPORT, 2), ("os:replace", 2)))],
    "between the last export and the last checkpoint": [Moment(((EXPORT, 3),), "after")],
    "after the last checkpoint": [Moment(((SAVE, 4),), "after")],
    "in a step, and again while it resumes": [
        BETWEEN_NETWORKS,
        Moment((("dinov2.train.train:load_checkpoint", 1),), "after"),
        Moment(((CUT_BACK, 1), ("os:replace", 1))),
    ],
    "in the same save again and again": 3 * [Moment(((SAVE, 1), ("os:fsync", 1)), "halfway")],
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the run that nobody killed, by the settings; made once."""
    made: dict[tuple, Path] = {}

    def of(*overrides: str, images: Path | None = None) -> Path:
        if (overrides, images) not in made:
            run = tmp_path_factory.mktemp("unbroken") / "run"
            assert live(run, *overrides, images=images) == 0
            made[overrides, images] = run
        return made[overrides, images]

    return of


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 pictures and six files that are none."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        path = folder / f"{number:02}.png"
        if number % 7 == 3:
            path.write_bytes(b"\x89PNG no image" * number)
        else:
            Image.fromarray(random.integers(0, 256, (24 + number, 30, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("moments", LIVES.values(), ids=LIVES.keys())
def test_a_run_goes_on_to_the_bit_when_it_was_killed(tmp_path, unbroken, moments):
    run = tmp_path / "run"
    for moment in moments:
        assert live(run, *EVERYTHING, until=moment) == KILLED
    assert live(run, *EVERYTHING) == 0
    equals(run, unbroken(*EVERYTHING))


def test_the_comparison_sees_another_seed_in_every_part(unbroken):
    one, other = remains(unbroken(*EVERYTHING)), remains(unbroken(*EVERYTHING, "train.seed=1"))
    assert one["step"] == other["step"] == 12 and len(one["metrics"]) == 12
    assert one["checkpoint"].keys() == other["checkpoint"].keys() and one["teachers"].keys() == other["teachers"].keys()
    for part in ("student.backbone", "teacher.ibot_head", "dino_loss.center", "ibot_patch_loss.center", "exp_avg_sq"):
        keys = [key for key in one["checkpoint"] if part in key]
        assert keys and any(one["checkpoint"][key] != other["checkpoint"][key] for key in keys), part
    assert all(a["loss"] != b["loss"] for a, b in zip(one["metrics"], other["metrics"], strict=True))


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_another_number_of_loader_workers_changes_nothing(tmp_path, unbroken, damaged_folder, backend, centering):
    overrides = (
        *EVERYTHING, f"train.centering={centering}", f"train.augmentation_backend={backend}",
        "train.cache_dataset=false", "crops.blur_p=[1.0,0.5,0.5]", "crops.solarize_p=0.5",
        "crops.color_jitter_strength=1.0",
    )  # fmt: skip
    run, whole = tmp_path / "run", unbroken(*overrides, images=damaged_folder)
    assert live(run, *overrides, images=damaged_folder, until=BETWEEN_NETWORKS) == KILLED
    resumed = (*overrides, "train.num_workers=2")
    assert live(run, *resumed, images=damaged_folder, until=HALF_THE_TENSORS) == KILLED
    assert live(run, *resumed, images=damaged_folder) == 0
    equals(run, whole)
    assert remains(whole)["unreadable"] == [f"{number:02}.png" for number in (3, 10, 17, 24, 31, 38)]


BIG = ("dino.head_bottleneck_dim=64", "dino.head_n_prototypes=4200")  # prototypes of more than 1 MiB
OTHER_SETTINGS = {
    "tensors that are big enough to be stored one by one": BIG,
    "bf16 and Sinkhorn-Knopp": ("train.precision=bf16", "train.centering=sinkhorn_knopp"),
    "one head, drop path per sample": ("student.drop_path_per_sample=true", "ibot.separate_head=false"),
    "metrics every fifth step": ("train.log_every=5",),
    # Slow where other programs keep the second core busy.
    "two threads": pytest.param((*BIG, "train.num_threads=2"), marks=pytest.mark.slow),
}


@pytest.mark.parametrize("overrides", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS.keys())
def test_a_killed_run_with_other_settings_goes_on_to_the_bit(tmp_path, unbroken, overrides):
    settings, run = (*EVERYTHING, *overrides), tmp_path / "run"
    assert live(run, *settings, until=BETWEEN_NETWORKS) == KILLED
    assert live(run, *settings, until=HALF_THE_TENSORS) == KILLED
    assert live(run, *settings) == 0
    equals(run, unbroken(*settings))


def test_nothing_is_left_behind_by_saves_and_exports_that_were_killed(tmp_path, unbroken):
    settings, run = (*EVERYTHING, "train.keep_checkpoints=1"), tmp_path / "run"
    for moment in (
        HALF_THE_TENSORS,  # of the checkpoint after step 6
        Moment(((EXPORT, 2), ("os:replace", 2))),  # after step 8, when that of step 6 is saved and 3 dropped
        Moment(((DROP, 1), ("os:unlink", 1)), "after"),  # of the checkpoint after step 6
    ):
        assert live(run, *settings, until=moment) == KILLED
    assert live(run, *settings) == 0

    def files(folder: Path) -> set[str]:
        inside = {path.relative_to(folder) for path in folder.rglob("*")}
        # Where TensorBoard is installed, each life writes an event file of its own.
        return {str(path) for path in inside if path.parts[0] != "tensorboard"}

    assert files(run) == files(unbroken(*settings))


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_from_before_every_single_file_operation(tmp_path, unbroken):
    overrides = (
        *EVERYTHING, "optim.epochs=2", "train.OFFICIAL_EPOCH_LENGTH=2", "train.checkpoint_every=2",
        "train.keep_checkpoints=1",
    )  # fmt: skip
    operation = 0
    while True:
        operation += 1
        run = tmp_path / str(operation) / "run"
        run.parent.mkdir()
        if live(run, *overrides, until=NthFileOperation(run, operation)) == 0:
            break
        assert live(run, *overrides) == 0, operation
        equals(run, unbroken(*overrides))
    assert operation > 40  # two saves, a removal, an export
