"""`dinov2 train`: where it writes, what it says, what it refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import PRESET, SMALL, contents, only_sentence, pictures

REPOSITORY = Path(__file__).resolve().parents[2]


def steps(run: Path) -> int:
    return len((run / "training_metrics.json").read_text().splitlines())


def test_images_in_a_folder_are_enough(dinov2, here):
    pictures(here / "Fotos ä" / "a b")
    ended = dinov2("train", "--data", "Fotos ä", "--output-dir", "mein Lauf", *PRESET, "--max-steps", "3")
    assert ended.code == 0
    assert steps(here / "mein Lauf") == 3
    assert "data       12 images from Fotos ä" in ended.out
    assert "3 of 12 steps done" in ended.out
    assert "results are in mein Lauf" in ended.out
    assert "dinov2 report 'mein Lauf'" in ended.out  # can be pasted as it stands
    assert "training 3/3: loss" in ended.err


def test_without_an_output_folder_the_run_is_a_new_printed_folder_below_runs(dinov2, here):
    pictures(here / "photos")
    before = contents(here)
    for option in ((), ("--output-dir", "")):
        ended = dinov2("train", "--data", "photos", *PRESET, "--max-steps", "1", *option)
        assert ended.code == 0
        folder = re.search(r"^results are in (.*)$", ended.out, re.MULTILINE)[1]
        assert re.fullmatch(r"runs/\d{8}-\d{6}-train-[0-9a-f]{8}", Path(folder).as_posix())
        assert steps(here / folder) == 1
    assert len(list((here / "runs").iterdir())) == 2
    assert {name: data for name, data in contents(here).items() if not name.startswith("runs")} == before


def test_overrides_may_stand_anywhere(dinov2, here):
    words = "optim.epochs=5 --preset toy train.seed=2 --data toy:n=8 optim.epochs=2 --dry-run train.seed=3"
    ended = dinov2("train", *SMALL, *words.split())
    assert ended.code == 0
    assert "8 = 2 epochs of 4 steps" in ended.out and "  seed: 3\n" in ended.out


def test_data_wins_over_an_override_of_the_same_key(dinov2):
    ended = dinov2("train", *PRESET, "train.dataset_path=toy:n=99", "--data", "toy:n=8", "--dry-run")
    assert "8 images from toy:n=8" in ended.out


def test_a_dry_run_checks_everything_and_writes_nothing(dinov2, here):
    pictures(here / "photos")
    before = contents(here)
    ended = dinov2("train", "--data", "photos", *PRESET, "--dry-run")
    assert ended.code == 0 and contents(here) == before
    assert "12 images from photos" in ended.out
    assert "\noptim:\n  epochs: 3\n" in ended.out
    refused = dinov2("train", "--data", "photos", *PRESET, "--dry-run", "student.patch_size=7")
    assert refused.code == 2 and contents(here) == before
    assert "patch" in only_sentence(refused)


def test_a_dry_run_of_a_run_that_cannot_go_on_says_so(dinov2, here, run):
    before = contents(run)
    ended = dinov2(
        "train", *PRESET, "--data", "toy:split=TRAIN:n=40", "--output-dir", run, "--dry-run", "optim.epochs=4"
    )
    assert ended.code == 2 and "optim.epochs was 3, now 4" in only_sentence(ended)
    assert contents(run) == before


def test_the_same_command_goes_on_and_then_finds_nothing_to_do(dinov2, here):
    words = ("train", *PRESET, "--data", "toy:n=40", "--output-dir", "run")
    assert dinov2(*words, "--max-steps", "4").code == 0
    second = dinov2(*words)
    assert second.code == 0 and "resuming   from step 4" in second.out
    assert steps(here / "run") == 12
    third = dinov2(*words)
    assert third.code == 0 and "nothing is left to do" in third.out


def test_presets_are_listed_with_a_sentence_each(dinov2, here):
    ended = dinov2("train", "--list-presets")
    assert ended.code == 0 and list(here.iterdir()) == []
    assert re.search(r"^toy +A .*\.$", ended.out, re.MULTILINE) and "cifar10" in ended.out


def test_a_packaged_configuration_of_the_release_is_known_by_name(dinov2):
    small = ("student.arch=vit_nano", "dino.head_n_prototypes=64", "ibot.head_n_prototypes=64", "train.num_workers=0")
    ended = dinov2("train", "--config-file", "vitl16_short", "--data", "toy:n=8", *small, "--dry-run")
    assert ended.code == 0
    assert "125,000 = 100 epochs of 1,250 steps" in ended.out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("optim.epoch=7",), "there is no key optim.epoch; the nearest is optim.epochs"),
        (("optim.epochs=seven",), "optim.epochs is 'seven'; write a whole number"),
        (("optim.epochs=0",), "optim.epochs is 0; write 1 or more"),
        (("crops.local_crops_scale=0.3",), "crops.local_crops_scale is"),
        (("epochs",), "'epochs' is not an override; write key=value"),
        (("photos",), "'photos' is a path and not a key=value; to train on the images there, write --data photos"),
        (("--data", "photo"), "'photo'"),
        (("--data", "./photo"), "the data set path './photo' does not exist"),
        (("--data", "list:none.txt"), "none.txt"),
        (("--data", "toyy:n=8"), "toy"),
        (("--data", ""), "the name of the data is empty"),
        (("--data", "empty"), "no image was found in"),
        (("--data", "small"), "the images of small are smaller than a patch (5x5 pixels, patches of 8)"),
        (("--data", "file"), "file"),
        (("--output-dir", "file"), "the output folder file is a file; choose another path"),
        (("--output-dir", "file/below"), "is a file; choose another"),
        (("--config-file", "vitl16_short"), "a preset and a config file were both given"),
        (("train.device=gpu",), "train.device is 'gpu'; write auto, cpu, cuda"),
        (("train.device=cuda:99",), "the device 'cuda:99'"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_everything_as_it_was(dinov2, here, words, sentence):
    pictures(here / "photos")
    pictures(here / "small", n=4, size=5)
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    before = contents(here)
    ended = dinov2("train", *PRESET, "--data", "photos", *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before


@pytest.mark.parametrize(
    "words, sentence",
    [
        ((), "no images were named; add --data DIR"),
        (("--config-file", "train/vitl16_short"), "no images were named; add --data DIR"),
        (("--preset", "toyy"), "no preset is called 'toyy'; write "),
        (("--preset", ""), "the name of the preset is empty"),
        (("--config-file", ""), "the name of the config file is empty"),
        (("--config-file", "train/vitl16_shrt"), "the nearest packaged name is train/vitl16_short"),
        (("--config-file", "mine.yaml"), "there is no file and no packaged config called 'mine.yaml'"),
        (("--config-file", "."), "is a folder; write a YAML file"),
    ],
)
def test_a_recipe_that_does_not_exist_is_one_sentence(dinov2, here, words, sentence):
    ended = dinov2("train", *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert list(here.iterdir()) == []


def test_a_config_file_with_a_misspelt_key_is_named(dinov2, here):
    (here / "mine.yaml").write_text("optim:\n  epoch: 3\n")
    ended = dinov2("train", "--config-file", "mine.yaml", "--data", "toy:n=8")
    assert ended.code == 2
    assert "there is no key optim.epoch in mine.yaml; the nearest is optim.epochs" in only_sentence(ended)


@pytest.mark.parametrize("output", [(), ("--output-dir", "photos/run"), ("--output-dir", ".")])
def test_a_run_among_its_own_images_is_refused(dinov2, here, output):
    """Its pictures would be images at the next start, and the data would have changed."""
    pictures(here / "photos")
    before = contents(here)
    for extra in ((), ("--dry-run",)):
        ended = dinov2("train", "--data", ".", *PRESET, *output, *extra)
        assert ended.code == 2
        assert "lies in the folder of the images (.)" in only_sentence(ended)
        assert contents(here) == before
    ended = dinov2("train", "--data", "photos", *PRESET, "--output-dir", "photos2", "--max-steps", "1")
    assert ended.code == 0


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("optim.base_lr=0.5",), "holds a run with other settings (optim.base_lr was 0.001, now 0.5)"),
        (("--data", "toy:split=VAL:n=40"), "have changed since it was saved"),
        (("--no-resume",), "already holds a run, and --no-resume would overwrite it"),
    ],
)
def test_the_folder_of_another_run_is_refused_and_left_alone(dinov2, run, words, sentence):
    before = contents(run)
    ended = dinov2("train", *PRESET, "--data", "toy:split=TRAIN:n=40", "--output-dir", run, *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(run) == before


def test_several_processes_are_refused(dinov2, here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = dinov2("train", *PRESET, "--data", "toy:n=40")
    assert ended.code == 2 and "2 processes were launched" in only_sentence(ended)
    assert list(here.iterdir()) == []


def test_corrupt_images_are_counted_at_the_end(dinov2, here):
    pictures(here / "photos", n=7)
    (here / "photos" / "cut.jpg").write_bytes(b"\xff\xd8\xff no image")
    ended = dinov2("train", *PRESET, "--data", "photos", "--output-dir", "run")
    assert ended.code == 0
    assert "1 images could not be read, see unreadable_images.json" in ended.out
    assert json.loads((here / "run" / "unreadable_images.json").read_text())["count"] == 1


def test_a_teacher_that_cannot_be_written_ends_with_1_and_keeps_the_checkpoints(dinov2, here):
    words = ("train", *PRESET, "--data", "toy:n=40", "--output-dir", "run")
    assert dinov2(*words, "--max-steps", "3").code == 0
    shutil.rmtree(here / "run" / "eval")
    (here / "run" / "eval").write_text("in the way")
    ended = dinov2(*words)
    assert ended.code == 1
    assert "teacher_checkpoint.pth could not be written" in only_sentence(ended)
    assert sorted(path.name for path in (here / "run" / "checkpoints").iterdir())[-1] == "step_0000012"
    (here / "run" / "eval").unlink()
    assert dinov2(*words).code == 0
    assert (here / "run" / "eval" / "training_11" / "teacher_checkpoint.pth").is_file()


# In processes of their own.


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dinov2", "train", "--data", "toy:n=40", "--output-dir", str(folder)]
    command += [*PRESET, *words]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to consoles, not to processes")
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    process = started(
        run, "--yes", "train.OFFICIAL_EPOCH_LENGTH=5000", "train.checkpoint_every=100000", "train.log_every=20"
    )
    wait_for(lambda: (run / "training_metrics.json").exists() and steps(run) > 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGINT, a checkpoint is saved: the same command with --output-dir" in out
    assert "Traceback" not in err
    done = int(re.search(r"^([\d,]+) of 15,000 steps done", out, re.MULTILINE)[1].replace(",", ""))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{done:07}"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork loader workers")
def test_a_training_with_loader_workers_that_fails_ends(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    process = started(run, "train.augmentation_backend=pil", "train.num_workers=2", "train.cache_dataset=false")
    _, err = process.communicate(timeout=90)  # workers leave SIGTERM to their parent, which waits for them at its end
    assert process.returncode == 1
    assert "the checkpoint of step 3 could not be written" in err.splitlines()[-1]


def test_too_many_passes_are_refused_unless_the_user_says_yes_or_how_long(dinov2, here):
    command = ("train", "--data", "toy:n=4", "--output-dir", "run", *PRESET, "train.OFFICIAL_EPOCH_LENGTH=1000")
    refused = dinov2(*command)
    assert refused.code == 2 and "are 3,000 passes over 4 images" in refused.err
    assert refused.err.count("\n") == 1 and not (here / "run").exists()
    assert dinov2(*command, "--max-steps", "2").code == 0
    assert "resuming   from step 2" in dinov2(*command, "--max-steps", "3").out
