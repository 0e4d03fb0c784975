"""The release's train and k-NN commands, from a clone with `PYTHONPATH=.` and nothing installed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dinov2.run.eval import knn, linear, log_regression
from dinov2.run.eval.flags import config_from_flags
from dinov2.run.train import train
from tests.runs import SMALL, Ended, contents, only_sentence, quiet_logger

TRAIN, KNN = "dinov2/run/train/train.py", "dinov2/run/eval/knn.py"
PRECISION = "compute_precision.teacher.backbone.mixed_precision.param_dtype"
# What the packaged recipe for ViT-L needs to become one for a test: SMALL is made for the preset `toy`.
TINY_L16 = (
    *SMALL,
    "train.dataset_path=toy:split=TRAIN:n=40",
    "student.patch_size=8",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    "student.block_chunks=2",
    "student.drop_path_rate=0",
    "teacher.warmup_teacher_temp_epochs=1",
)


@pytest.fixture
def in_process(monkeypatch, capsys, tmp_path):
    """The same `main`, called here: quicker, for what does not depend on the process."""
    monkeypatch.chdir(tmp_path)

    def command(main, *words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["command.py", *map(str, words)])
        try:
            with quiet_logger():
                code = main()
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Ended(code, *capsys.readouterr())

    return command


def test_a_command_is_found_from_a_clone_and_its_refusal_is_one_sentence(release_command):
    ended = release_command(TRAIN, "--nodes", 2, "--config-file", "dinov2/configs/train/vitl16_short.yaml")
    assert (ended.code, ended.out) == (2, "")
    assert "--nodes is 2" in only_sentence(ended)


@pytest.mark.slow
def test_the_readme_s_train_and_k_nn_commands_run_one_after_the_other(release_command, clone, tmp_path):
    config = "dinov2/configs/train/vitl16_short.yaml"
    out = tmp_path / "out"
    ended = release_command(TRAIN, "--nodes", 1, "--config-file", config, "--output-dir", out, *TINY_L16)
    assert ended.code == 0, ended.err
    assert "12 of 12 steps done" in ended.out
    teacher = out / "eval" / "training_11" / "teacher_checkpoint.pth"
    ended = release_command(
        KNN, "--config-file", out / "config.yaml", "--pretrained-weights", teacher,
        "--output-dir", teacher.parent / "knn",
        "--train-dataset", "toy:split=TRAIN:n=40", "--val-dataset", "toy:split=VAL:n=20", "--nb_knn", 10, 20,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "k=20 top-1: " in ended.out
    results = json.loads((teacher.parent / "knn" / "results_eval_knn.json").read_text())
    assert repr(("full", 10)) + " Top 1" in results
    assert sorted(path.name for path in clone.iterdir()) == ["dinov2"]


@pytest.mark.parametrize(
    "main, flags",
    [
        (train.main, "--config-file --no-resume --eval-only --eval --output-dir"),
        (
            knn.main,
            "--config-file --pretrained-weights --output-dir --opts --train-dataset --val-dataset --nb_knn "
            "--temperature --gather-on-cpu --batch-size --n-per-class-list --n-tries",
        ),
        (
            log_regression.main,
            "--config-file --pretrained-weights --output-dir --opts --train-dataset --val-dataset "
            "--finetune-dataset-str --finetune-on-val --metric-type --train-features-device --train-dtype "
            "--max-train-iters",
        ),
        (
            linear.main,
            "--config-file --pretrained-weights --output-dir --opts --train-dataset --val-dataset --test-datasets "
            "--epochs --epoch-length --batch-size --num-workers --save-checkpoint-frequency --eval-period-iterations "
            "--learning-rates --no-resume --val-metric-type --test-metric-types --classifier-fpath "
            "--val-class-mapping-fpath --test-class-mapping-fpaths",
        ),
    ],
)
def test_the_release_s_flags_are_in_the_help(in_process, main, flags):
    ended = in_process(main, "--help")
    assert ended.code == 0
    flags += " --ngpus --nodes --timeout --partition --use-volta32 --comment --exclude"
    assert [flag for flag in flags.split() if flag not in ended.out] == []


def test_eval_only_exports_the_teacher_of_the_newest_checkpoint(in_process, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    ended = in_process(train.main, "--eval-only", "--config-file", run / "config.yaml", "--output-dir", "run")
    assert ended.code == 0
    exported = tmp_path / "run" / "eval" / "manual_12" / "teacher_checkpoint.pth"
    assert ended.out == f"written: {exported}\n" and exported.is_file()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--nodes", 2), "--nodes is 2. There is no scheduler to start a job on several nodes: use --nodes 1"),
        (("--ngpus", 8), "--ngpus is 8, but training runs in one process in this version: use --ngpus 1"),
        (("optim.epoch=3",), "the nearest is optim.epochs"),
        (("train.dataset_path=nowhere",), "'nowhere'"),
        (("--config-file", "train/vitl16_shrt"), "the nearest packaged name is train/vitl16_short"),
        (("--output-dir", "file"), "the output folder file is a file"),
        (("--eval-only",), "holds no checkpoint to export a teacher from"),
    ],
)
def test_wrong_input_of_train_is_one_sentence(in_process, tmp_path, monkeypatch, words, sentence):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (tmp_path / "file").write_text("mine")
    ended = in_process(train.main, "--config-file", "vitl16_short", "--output-dir", "out", *TINY_L16, *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(tmp_path) == {"file": b"mine"}


def test_several_nodes_where_a_scheduler_is_are_refused_too(in_process, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    ended = in_process(train.main, "--nodes", 2)
    assert ended.code == 2 and "SLURM is here, but this version cannot start" in only_sentence(ended)


def test_a_folder_with_a_run_is_not_overwritten_with_no_resume(in_process, run):
    before = contents(run)
    ended = in_process(train.main, "--config-file", run / "config.yaml", "--output-dir", run, "--no-resume")
    assert ended.code == 2 and "--no-resume would overwrite it" in only_sentence(ended)
    assert contents(run) == before


@pytest.mark.parametrize(
    "main, words, sentence",
    [
        (train.main, TINY_L16, "2 processes were launched"),
        (knn.main, ("--pretrained-weights", "RUN"), "start with torchrun, which sets all six"),
    ],
)
def test_processes_without_a_launcher_are_refused(in_process, run, tmp_path, monkeypatch, main, words, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = in_process(main, *(run if word == "RUN" else word for word in words))
    assert ended.code == 2 and sentence in only_sentence(ended)
    assert contents(tmp_path) == {}


def test_the_release_s_linear_probe_augments_and_chooses_on_the_scored_images(in_process, run, tmp_path):
    words = (
        "--config-file", run / "config.yaml", "--pretrained-weights", run, "--num-workers", 0,
        "--train-dataset", "toy:n=60", "--val-dataset", "toy:split=VAL:n=20",
    )  # fmt: skip
    ended = in_process(
        linear.main, *words, "--epochs", 2, "--epoch-length", 3, "--batch-size", 16, "--learning-rates", 0.1,
        "--test-datasets", "toy:split=VAL:n=10", "--output-dir", "out",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "best classifier: blocks=" in ended.out and ended.out.count("top-1: ") == 2
    rows = json.loads((tmp_path / "out" / "results_eval_linear.json").read_text())["rows"]
    settings = rows[0]["settings"]
    assert (settings["n_iterations"], settings["batch_size"], settings["selected_on"]) == (6, 16, "reported set")
    assert {row["dataset"] for row in rows} == {"toy:split=VAL:n=20", "toy:split=VAL:n=10"}
    for wrong, sentence in (
        (("--epochs", 0), "--epochs is 0; write 1 or more"),
        (("--test-metric-types", "mean_accuracy"), "1 test metrics were given for 0 test sets"),
    ):
        ended = in_process(linear.main, *words, *wrong)
        assert ended.code == 2 and sentence in only_sentence(ended)


def test_released_weights_are_named_by_their_address_and_results_get_a_folder_of_their_own(
    in_process, run, tmp_path, monkeypatch
):
    """As the release's README writes it: a packaged configuration, an address, no output folder."""
    import functools
    import http.server
    import threading

    served = tmp_path / "served"
    served.mkdir()
    shutil.copy(run / "eval" / "training_11" / "teacher_checkpoint.pth", served / "dinov2_vits14_pretrain.pth")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        ended = in_process(
            knn.main, "--config-file", run / "config.yaml", "--nb_knn", 3,
            "--pretrained-weights", f"http://127.0.0.1:{server.server_port}/dinov2_vits14_pretrain.pth",
            "--train-dataset", "toy:n=40", "--val-dataset", "toy:split=VAL:n=20",
        )  # fmt: skip
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert ended.code == 0, ended.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "results_eval_knn.json").is_file()


def test_the_release_s_logistic_regression_writes_its_figures_and_resizes_to_the_crop(in_process, run, tmp_path):
    ended = in_process(
        log_regression.main, "--config-file", run / "config.yaml", "--pretrained-weights", run, "--output-dir", "out",
        "--train-dataset", "toy:n=60", "--val-dataset", "toy:split=VAL:n=20", "--max-train-iters", 50,
        "--opts", f"{PRECISION}=bf16",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "best C: " in ended.out and "top-1: " in ended.out
    row = json.loads((tmp_path / "out" / "results_eval_log_regression.json").read_text())["rows"][0]
    assert row["transform"]["resize"] == row["transform"]["crop"] == 32
    assert (row["settings"]["selected_on"], row["settings"]["dtype"]) == ("6 of 60 training images", "float64")
    assert len(row["settings"]["curve"]) == 45
    assert row["precision"] == "bfloat16" and "=fp16 insists" not in ended.out


@pytest.mark.parametrize(
    "device, given, precision",
    [
        ("cuda", None, "fp16"),
        ("cuda", "fp32", "fp32"),
        ("cpu", None, "auto"),
        ("cpu", "fp16", "fp16"),
        ("cpu", "fp32", "fp32"),
    ],
)
@pytest.mark.parametrize("command", [knn, log_regression, linear])
def test_evaluations_compute_in_the_precision_of_the_configuration(
    command, device, given, precision, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dinov2.run.eval.flags.choose_device", lambda name: torch.device(device))
    (tmp_path / "mine.yaml").write_text(
        "compute_precision: {teacher: {backbone: {mixed_precision: {param_dtype: fp16}}}}"
    )
    words = ["--config-file", str(tmp_path / "mine.yaml"), "--pretrained-weights", "w.pth"]
    words += ["--opts", f"{PRECISION}={given}"] if given else []
    with quiet_logger():
        assert config_from_flags(command.get_args_parser().parse_args(words)).precision == precision
    assert ("=fp16 insists" in capsys.readouterr().out) == (precision == "auto")


def test_an_evaluation_s_configuration_need_not_be_one_to_train_with(in_process, run, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "student: {arch: vit_small, patch_size: 14}\ncrops: {global_crops_size: 518}\ntrain: {batch_size_per_gpu: 1}\n"
    )
    sets = ("--train-dataset", "toy:n=4", "--val-dataset", "toy:split=VAL:n=4")
    ended = in_process(knn.main, "--config-file", "mine.yaml", "--pretrained-weights", run, *sets)
    assert ended.code == 2 and "does not fit this model" in only_sentence(ended)  # it got as far as the weights
    trained = in_process(train.main, "--config-file", "mine.yaml", "--output-dir", "out", "train.dataset_path=toy:n=8")
    assert trained.code == 2
    assert "crops.local_crops_size is 96, which is not a multiple of" in only_sentence(trained)
    assert not (tmp_path / "out").exists()


def test_one_process_of_torchrun_is_welcome(in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    ended = in_process(train.main, "--config-file", "vitl16_short", *TINY_L16, "optim.epochs=2")
    assert ended.code == 0
    (folder,) = (tmp_path / "runs").iterdir()  # no output folder was given: not the current one
    assert "8 of 8 steps done" in ended.out and folder.name in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ((), "--pretrained-weights is missing"),
        (("--pretrained-weights", "nowhere.pth"), "there is no weight file nowhere.pth"),
        (("--pretrained-weights", "RUN", "--opts", "student.depth=3"), "The depths differ"),
        (("--pretrained-weights", "RUN", "--opts", "student.dept=3"), "the nearest is student.depth"),
        (("--pretrained-weights", "RUN", "--nodes", "3"), "--nodes is 3"),
        (("--pretrained-weights", "RUN", "--nb_knn", "0"), "a number of neighbours is 0; write 1 or more"),
        (("--pretrained-weights", "RUN", "--batch-size", "0"), "the batch is 0; write 1 or more"),
        (("--pretrained-weights", "RUN", "--n-tries", "0"), "the number of tries is 0; write 1 or more"),
        (("--pretrained-weights", "RUN", "--config-file", "vits14_pretrain"), "does not fit this model"),
    ],
)
def test_wrong_input_of_knn_is_one_sentence(in_process, run, tmp_path, words, sentence):
    words = [run if word == "RUN" else word for word in words]
    sets = ("--train-dataset", "toy:n=40", "--val-dataset", "toy:split=VAL:n=20")
    ended = in_process(knn.main, "--config-file", run / "config.yaml", *sets, *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(tmp_path) == {}


def test_the_files_are_where_the_release_has_them():
    root = Path(train.__file__).parents[2]
    assert root.name == "dinov2" and (root.parent / TRAIN).is_file() and (root.parent / KNN).is_file()
