"""A run from start to end: what it writes, what it refuses, what it survives."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.apps.doctor import examine_run
from dinov2.apps.train import check_training
from dinov2.checkpoints.runs import newest_teacher
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.engine.metrics import read_metrics
from dinov2.errors import ConfigError, DataError, TrainingDiverged
from dinov2.pretrained import load
from dinov2.train import train as train_module
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import export_latest, train
from tests.train.tiny_run import tiny_config


def quiet(text: str) -> None:
    pass


def picture(path: Path, seed: int, size: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the log, which this process may still hold open."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("logs")}


def test_a_run_writes_metrics_checkpoints_config_and_teachers(tmp_path):
    cfg, lines = tiny_config("evaluation.eval_period_iterations=5"), []
    outcome = train(cfg, tmp_path / "run", announce=lines.append)
    assert (outcome.step, outcome.total, outcome.stopped_by) == (12, 12, None)
    rows = read_metrics(tmp_path / "run" / "training_metrics.json")
    assert [row["iteration"] for row in rows] == list(range(12))
    expected = ["iteration", "iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "current_batch_size"]
    expected += ["total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss"]
    assert list(rows[0])[: len(expected)] == expected
    terms = rows[5]["dino_local_crops_loss"] + rows[5]["dino_global_crops_loss"] + rows[5]["koleo_loss"]
    assert rows[5]["total_loss"] == pytest.approx(terms)
    assert rows[5]["loss"] == pytest.approx(terms + rows[5]["koleo_loss"], rel=1e-5)
    exported = sorted(p.name for p in (tmp_path / "run" / "eval").iterdir())
    assert exported == ["training_11", "training_4", "training_9"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_0000006", "step_0000009", "step_0000012",
    ]  # fmt: skip
    text = "\n".join(lines)
    for word in ("0.1 M parameters", "40 images", "4 images a step", "12 = 3 epochs of 4 steps", "float32", "run"):
        assert word in text


def test_the_exported_teacher_is_the_releases_layout_and_loads_strictly(tmp_path):
    run = tmp_path / "run"
    train(tiny_config(), run, announce=quiet)
    file = torch.load(run / "eval" / "training_11" / "teacher_checkpoint.pth", weights_only=True)
    assert {key.split(".")[0] for key in file["teacher"]} == {"backbone", "dino_head"}
    loaded = load(run)
    assert loaded.source == str(run / "eval" / "training_11" / "teacher_checkpoint.pth")
    assert loaded.backbone.n_blocks == 2 and loaded.transform.crop_size == 32
    assert torch.equal(loaded.backbone.pos_embed, file["teacher"]["backbone.pos_embed"])
    beside = load(Path(loaded.source).with_name("backbone.safetensors"))
    assert torch.equal(beside.backbone.norm.weight, loaded.backbone.norm.weight)


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    refusals = []

    def second(training, step):
        for command in (
            lambda: train(tiny_config(), tmp_path, announce=quiet),
            lambda: check_training(tiny_config(), output_dir=tmp_path),
        ):
            with pytest.raises(ConfigError, match="another process is writing its results") as refusal:
                command()
            refusals.append(str(refusal.value))

    assert train(tiny_config(), tmp_path, max_steps=2, evaluate=second, announce=quiet).step == 2
    assert len(refusals) == 2 and all("\n" not in text for text in refusals)
    assert len(read_metrics(tmp_path / "training_metrics.json")) == 2
    assert not (tmp_path / ".train.lock").exists()


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_and_ends_the_same(tmp_path):
    train(tiny_config(), tmp_path / "whole", announce=quiet)
    train(tiny_config(), tmp_path / "hurt", max_steps=8, announce=quiet)
    file = tmp_path / "hurt" / "checkpoints" / "step_0000008" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 5] ^= 0x10
    file.write_bytes(content)
    lines = []
    train(tiny_config(), tmp_path / "hurt", announce=lines.append)
    assert "resuming   from step 6" in lines[0]
    whole, hurt = (CheckpointStore(tmp_path / run / "checkpoints").load(12)["model"] for run in ("whole", "hurt"))
    assert all(torch.equal(hurt[key], whole[key]) for key in whole)


def test_max_steps_stops_there_with_schedules_unchanged_and_a_second_call_goes_on(tmp_path):
    cfg = tiny_config()
    train(cfg, tmp_path / "whole", announce=quiet)
    assert train(cfg, tmp_path / "parts", max_steps=5, announce=quiet).step == 5
    assert train(cfg, tmp_path / "parts", announce=quiet).step == 12
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_metrics_of_a_run_that_stopped_between_two_rows_are_those_of_the_unbroken_one(tmp_path):
    cfg = tiny_config("train.log_every=3")
    train(cfg, tmp_path / "whole", announce=quiet)
    train(cfg, tmp_path / "parts", max_steps=5, announce=quiet)
    assert [row["iteration"] for row in read_metrics(tmp_path / "parts" / "training_metrics.json")] == [0, 3, 4]
    train(cfg, tmp_path / "parts", announce=quiet)
    assert [row["iteration"] for row in read_metrics(tmp_path / "parts" / "training_metrics.json")] == [0, 3, 6, 9, 11]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def losses(run: Path) -> list[list[float]]:
    return [[v for k, v in row.items() if "time" not in k and k != "images_per_second"]
            for row in read_metrics(run / "training_metrics.json")]  # fmt: skip


def test_a_finished_run_is_left_as_it_is(tmp_path):
    cfg = tiny_config()
    train(cfg, tmp_path, announce=quiet)
    before, lines = contents(tmp_path), []
    assert train(cfg, tmp_path, announce=lines.append).step == 12
    assert contents(tmp_path) == before and "nothing is left to do" in lines[0]


@pytest.mark.parametrize(
    "override, key",
    [
        ("optim.epochs=4", "optim.epochs was 3, now 4"),
        ("student.depth=3", "student.depth was 2, now 3"),
        ("optim.base_lr=0.5", "optim.base_lr"),
        ("train.seed=1", "train.seed"),
        ("train.batch_size_per_gpu=5", "uses 4 images a step and this one would use 5"),
        ("train.dataset_path=toy:split=VAL:n=40", "have changed"),
    ],
)
def test_a_resume_that_would_compute_something_else_is_refused_and_writes_nothing(tmp_path, override, key):
    train(tiny_config(), tmp_path, max_steps=3, announce=quiet)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=key):
        train(tiny_config(override), tmp_path, announce=quiet)
    assert contents(tmp_path) == before


def test_changed_images_are_allowed_when_told_so(tmp_path):
    train(tiny_config(), tmp_path, max_steps=3, announce=quiet)
    cfg = tiny_config("train.dataset_path=toy:split=VAL:n=40", "train.allow_data_change=true")
    assert train(cfg, tmp_path, announce=quiet).step == 12


def test_no_resume_refuses_a_folder_with_a_run(tmp_path):
    train(tiny_config(), tmp_path, max_steps=3, announce=quiet)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny_config(), tmp_path, resume=False, announce=quiet)


def test_keys_that_change_no_figure_may_change(tmp_path):
    train(tiny_config(), tmp_path, max_steps=3, announce=quiet)
    cfg = tiny_config("train.log_every=2", "train.keep_checkpoints=1", "evaluation.eval_period_iterations=4")
    assert train(cfg, tmp_path, announce=quiet).step == 12


def test_evaluations_are_called_where_teachers_are_exported(tmp_path):
    seen = []
    cfg = tiny_config("evaluation.eval_period_iterations=4")
    train(cfg, tmp_path, evaluate=lambda training, it: seen.append((it, training.objective.training)), announce=quiet)
    assert [iteration for iteration, _ in seen] == [3, 7, 11]


def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    cfg = tiny_config("train.checkpoint_every=100", "evaluation.eval_period_iterations=4")

    def interrupt(training, iteration):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = train(cfg, tmp_path / "run", evaluate=interrupt, announce=quiet)
    assert outcome.stopped_by == "SIGTERM" and outcome.step == 4
    assert CheckpointStore(tmp_path / "run" / "checkpoints").latest() == 4
    assert train(cfg, tmp_path / "run", announce=quiet).step == 12
    train(cfg, tmp_path / "whole", announce=quiet)
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


def test_a_run_that_is_stopped_before_its_first_export_can_be_used(tmp_path, monkeypatch):
    honest = train_module.metrics_row

    def stop_in_the_second_step(training, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(training, step, *rest)

    monkeypatch.setattr(train_module, "metrics_row", stop_in_the_second_step)
    assert train(tiny_config(), tmp_path, announce=quiet).stopped_by == "SIGTERM"
    exported = load(tmp_path)
    assert exported.source == str(tmp_path / "eval" / "training_1" / "teacher_checkpoint.pth")
    assert examine_run(tmp_path).state == "stopped"

    shutil.rmtree(tmp_path / "eval")  # as after a kill: there is a checkpoint, and no export
    from_checkpoint = load(tmp_path)
    assert from_checkpoint.source == str(tmp_path / "eval" / "manual_2" / "teacher_checkpoint.pth")
    assert torch.equal(from_checkpoint.backbone.pos_embed, exported.backbone.pos_embed)
    assert from_checkpoint.transform.describe() == exported.transform.describe()


def test_the_newest_export_is_used_whoever_asked_for_it(tmp_path):
    for name in ("training_4", "manual_6", "training_x", "other_9"):
        (tmp_path / "eval" / name).mkdir(parents=True)
        (tmp_path / "eval" / name / "teacher_checkpoint.pth").touch()
    assert newest_teacher(tmp_path).parent.name == "manual_6"
    (tmp_path / "eval" / "training_5").mkdir()
    (tmp_path / "eval" / "training_5" / "teacher_checkpoint.pth").touch()
    assert newest_teacher(tmp_path).parent.name in ("manual_6", "training_5")  # both after six steps
    (tmp_path / "eval" / "training_6").mkdir()
    (tmp_path / "eval" / "training_6" / "teacher_checkpoint.pth").touch()
    assert newest_teacher(tmp_path).parent.name == "training_6"


def test_a_resumed_run_keeps_the_number_of_threads_that_it_began_with(tmp_path, monkeypatch):
    """Sums over another number of threads are rounded otherwise."""
    taken = []
    honest = train_module.fastest_threads
    monkeypatch.setattr(
        train_module,
        "fastest_threads",
        lambda *args, threads, **rest: taken.append(threads) or honest(*args, threads=2, **rest),
    )
    monkeypatch.setattr("dinov2.engine.threads.one_thread_gain", lambda work, device: 0.0)
    measured = tiny_config("train.num_threads=0")
    train(measured, tmp_path, max_steps=1, announce=quiet)
    train(measured, tmp_path, max_steps=2, announce=quiet)
    train(tiny_config("train.num_threads=3"), tmp_path, max_steps=3, announce=quiet)
    assert taken == [0, 2, 3]


def test_a_failing_evaluation_loses_no_steps(tmp_path):
    cfg = tiny_config("train.checkpoint_every=4", "evaluation.eval_period_iterations=4")

    def fail(training, iteration):
        raise RuntimeError("no such data")

    with pytest.raises(RuntimeError, match="no such data"):
        train(cfg, tmp_path, evaluate=fail, announce=quiet)
    assert CheckpointStore(tmp_path / "checkpoints").latest() == 4


def poisoned(monkeypatch, bad_steps: set[int]) -> None:
    """Makes the loss of some steps infinite, gradients included."""
    honest, calls = SSLMetaArch.forward, []

    def forward(self, batch, hyper):
        terms = honest(self, batch, hyper)
        calls.append(1)
        return terms._replace(total=terms.total * torch.inf) if len(calls) - 1 in bad_steps else terms

    monkeypatch.setattr(SSLMetaArch, "forward", forward)


def test_a_non_finite_step_changes_nothing_and_is_written_down(tmp_path, monkeypatch):
    poisoned(monkeypatch, {2})
    states = []

    def remember(training, iteration):
        states.append({k: v.clone() for k, v in training.objective.state_dict().items()})

    cfg = tiny_config("evaluation.eval_period_iterations=1", "train.centering=centering")
    outcome = train(cfg, tmp_path, evaluate=remember, announce=quiet)
    assert outcome.skipped == 1
    assert all(torch.equal(states[1][key], states[2][key]) for key in states[1])  # student, teacher and centers
    assert any(not torch.equal(states[2][key], states[3][key]) for key in states[2])
    (row,) = [json.loads(line) for line in (tmp_path / "skipped_steps.json").read_text().splitlines()]
    assert row["iteration"] == 2 and row["losses"]["total"] == "inf"
    assert row["sample_numbers"] == [8, 9, 10, 11] and len(row["images"]) == 4


def test_several_skipped_steps_in_a_row_end_the_run_with_what_to_try(tmp_path, monkeypatch):
    poisoned(monkeypatch, {4, 5, 6})
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row.*optim\.base_lr"):
        train(tiny_config("train.max_skipped_steps=3"), tmp_path, announce=quiet)


def test_skipped_steps_in_a_row_are_counted_across_a_resume(tmp_path, monkeypatch):
    poisoned(monkeypatch, {4, 5, 6})
    cfg = tiny_config("train.max_skipped_steps=3")
    assert train(cfg, tmp_path, max_steps=6, announce=quiet).skipped == 2
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        train(cfg, tmp_path, announce=quiet)


def test_corrupt_images_are_replaced_counted_and_listed(tmp_path):
    for i in range(38):
        picture(tmp_path / "images" / f"{i:02}.png", i)
    for name in ("cut.png", "text.jpg"):
        (tmp_path / "images" / name).write_bytes(b"\x89PNG no image" * 4)
    cfg = tiny_config("optim.epochs=6", folder=tmp_path / "images")  # 24 steps of 4: every image at least twice
    outcome = train(cfg, tmp_path / "run", announce=quiet)
    assert outcome.step == 24 and outcome.unreadable == 2
    listed = json.loads((tmp_path / "run" / "unreadable_images.json").read_text())
    assert listed["count"] == 2
    assert {Path(row["path"]).name for row in listed["images"]} == {"cut.png", "text.jpg"}


def test_a_folder_of_three_images_trains(tmp_path):
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", i)
    assert train(tiny_config(folder=tmp_path / "images"), tmp_path / "run", announce=quiet).step == 12


def test_a_folder_without_images_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="images"):
        train(tiny_config(folder=tmp_path / "images"), tmp_path / "run", announce=quiet)
    assert not (tmp_path / "run").exists()


def test_images_smaller_than_a_patch_are_refused(tmp_path):
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", i, size=5)
    with pytest.raises(DataError, match="smaller than a patch .5x5 pixels, patches of 8"):
        train(tiny_config(folder=tmp_path / "images"), tmp_path / "run", announce=quiet)


def test_a_folder_in_which_no_image_can_be_read_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="no image of .* can be read"):
        train(tiny_config(folder=tmp_path / "images"), tmp_path / "run", announce=quiet)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_number_of_channels(tmp_path, channels):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (24, 30, channels), dtype=np.uint8))
    overrides = (f"student.in_chans={channels}", "crops.mean=[0.5]", "crops.std=[0.25]")
    train(tiny_config(*overrides, folder=folder), tmp_path / "tensor", announce=quiet)
    cfg = tiny_config(*overrides, "train.augmentation_backend=pil", folder=folder)
    train(cfg, tmp_path / "pil", announce=quiet)
    assert load(tmp_path / "pil").backbone.patch_embed.in_chans == channels


def test_the_release_s_augmentation_and_registers_train_too(tmp_path):
    cfg = tiny_config(
        "train.augmentation_backend=pil", "student.num_register_tokens=2", "student.drop_path_rate=0.3",
        "student.ffn_layer=swiglufused", "student.block_chunks=2", "ibot.loss_weight=1", "ibot.separate_head=true",
        "ibot.head_n_prototypes=32", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16",
        "train.centering=centering", "ibot.mask_sample_probability=0.5",
    )  # fmt: skip
    train(cfg, tmp_path, announce=quiet)
    rows = read_metrics(tmp_path / "training_metrics.json")
    assert all(row["ibot_loss"] > 0 for row in rows)
    assert load(tmp_path).backbone.num_register_tokens == 2


def test_starting_weights_are_loaded_strictly_and_resized(tmp_path):
    train(tiny_config(), tmp_path / "first", max_steps=1, announce=quiet)
    weights = load(tmp_path / "first")
    cfg = tiny_config(
        f"student.pretrained_weights={weights.source}", "crops.global_crops_size=48", "optim.base_lr=0",
        "optim.min_lr=0", "optim.weight_decay=0", "optim.weight_decay_end=0",
    )  # fmt: skip
    train(cfg, tmp_path / "second", max_steps=1, announce=quiet)
    continued = load(tmp_path / "second")
    assert continued.backbone.pos_embed.shape == (1, 37, 64)
    assert torch.equal(continued.backbone.norm.weight, weights.backbone.norm.weight)
    with pytest.raises(ValueError, match="does not fit this model.*depths differ"):
        train(tiny_config(f"student.pretrained_weights={weights.source}", "student.depth=3"), tmp_path / "x")


def test_eval_only_exports_the_newest_checkpoint(tmp_path):
    cfg = tiny_config()
    train(cfg, tmp_path, max_steps=5, announce=quiet)
    file = export_latest(cfg, tmp_path)
    assert file == tmp_path / "eval" / "manual_5" / "teacher_checkpoint.pth"
    exported = torch.load(file, weights_only=True)["teacher"]
    at_the_end = torch.load(tmp_path / "eval" / "training_4" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert all(torch.equal(exported[key], at_the_end[key]) for key in exported)
    with pytest.raises(ConfigError, match="no checkpoint"):
        export_latest(cfg, tmp_path / "elsewhere")


def test_several_processes_are_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        train(tiny_config(), tmp_path, announce=quiet)


def test_the_metrics_of_a_broken_off_run_are_cut_back_to_its_checkpoint(tmp_path, monkeypatch):
    cfg = tiny_config()

    def break_off(*args, **options):
        raise RuntimeError("power cut")

    honest = train_module._save
    monkeypatch.setattr(
        train_module, "_save", lambda run, done, *rest: break_off() if done == 9 else honest(run, done, *rest)
    )
    with pytest.raises(RuntimeError, match="power cut"):
        train(cfg, tmp_path / "run", announce=quiet)
    assert len(read_metrics(tmp_path / "run" / "training_metrics.json")) == 9
    monkeypatch.undo()
    train(cfg, tmp_path / "run", announce=quiet)
    train(cfg, tmp_path / "whole", announce=quiet)
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
