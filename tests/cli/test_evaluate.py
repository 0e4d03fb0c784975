"""`dinov2 eval knn`: figures, where they are written, and every kind of file that is no backbone."""

import json
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch

from dinov2.apps.evaluation import features
from dinov2.cli import main
from dinov2.configs import load_config, to_yaml
from tests.runs import contents, only_sentence, pictures

SETS = ("--train-dataset", "toy:split=TRAIN:n=40", "--val-dataset", "toy:split=VAL:n=20", "--nb-knn", "3", "5")


class Code:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return open, ("code has run", "w")


def newest_teacher(run: Path) -> Path:
    return run / "eval" / "training_11" / "teacher_checkpoint.pth"


def teacher(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(newest_teacher(run), weights_only=True)["teacher"]


def figures(text: str) -> list[str]:
    return [line for line in text.splitlines() if "top-" in line]


def test_the_newest_teacher_of_a_run_is_evaluated(dinov2, here, run):
    ended = dinov2("eval", "knn", "--model", run, *SETS, "--output-dir", "Zahlen ü")
    assert ended.code == 0 and ended.err == ""
    assert f"{newest_teacher(run)}: 35 tensors loaded; 6 of projection heads left out" in ended.out
    assert re.findall(r"^model +k=(\d) +(top-\d) +[\d.]+ % \([\d.]+ to [\d.]+\)$", ended.out, re.MULTILINE) == [
        ("3", "top-1"), ("3", "top-5"), ("5", "top-1"), ("5", "top-5"),
    ]  # fmt: skip
    results = json.loads((here / "Zahlen ü" / "results_eval_knn.json").read_text(encoding="utf-8"))
    assert f"{results[repr(('full', 3)) + ' Top 1']:6.2f} %" in ended.out
    assert results["baselines"] == []
    assert results["rows"][0]["model"]["embed_dim"] == 64


def test_baselines_are_raw_pixels_and_an_untrained_model(dinov2, here, run):
    ended = dinov2("eval", "knn", "--model", run, *SETS, "--baselines", "--output-dir", "out")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines() if "top-1" in line] == [
        "model", "model", "untrained", "untrained", "raw", "raw",
    ]  # fmt: skip
    baselines = json.loads((here / "out" / "results_eval_knn.json").read_text())["baselines"]
    assert {row["model"]["name"] for row in baselines} == {"untrained backbone", "raw normalised pixels"}


def test_without_an_output_folder_results_are_in_a_new_printed_folder_below_runs(dinov2, here, run):
    for option in ((), ("--output-dir", "")):
        ended = dinov2("eval", "knn", "--model", run, *SETS, *option)
        folder = re.search(r"^results are in (.*)$", ended.out, re.MULTILINE)[1]
        assert re.fullmatch(r"runs/\d{8}-\d{6}-knn-[0-9a-f]{8}", Path(folder).as_posix())
        assert (here / folder / "results_eval_knn.json").is_file()
    assert [path.name for path in here.iterdir()] == ["runs"]


def test_few_shot_figures_say_how_many_images_a_class(dinov2, here, run):
    ended = dinov2("eval", "knn", "--model", run, *SETS, "--n-per-class-list", "2", "-1", "--n-tries", "2")
    assert ended.code == 0
    assert re.search(r"^model +k=2 +2 images a class +top-1 +[\d.]+ % \(", ended.out, re.MULTILINE)


@pytest.mark.parametrize("search", ["faiss", "faiss-ivf"])
def test_faiss_searches_on_request_and_says_what_it_missed(dinov2, here, run, search):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    exact = dinov2("eval", "knn", "--model", run, *SETS, "--output-dir", "exact")
    ended = dinov2("eval", "knn", "--model", run, *SETS, "--search", search, "--output-dir", "out")
    assert ended.code == 0 and ended.err == ""
    rows = json.loads((here / "out" / "results_eval_knn.json").read_text())["rows"]
    assert {row["settings"]["search"] for row in rows} == {search}
    note = re.search(r"^note: approximate search: it found ([\d.]+) % of the 5 nearest", ended.out, re.MULTILINE)
    if search == "faiss":
        assert note is None and figures(ended.out) == figures(exact.out)
    else:
        # 40 images make one cluster, so that here nothing is missed.
        assert float(note[1]) == 100


def test_a_search_that_is_not_installed_is_one_sentence_before_any_work(dinov2, here, run, monkeypatch):
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    monkeypatch.setitem(sys.modules, "faiss", None)
    ended = dinov2("eval", "knn", "--model", run, *SETS, "--search", "faiss")
    assert ended.code == 2
    assert only_sentence(ended).endswith("needs a package that is not installed; run: pip install 'faiss-cpu'")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["teacher", "bare backbone", "wrapped", "safetensors"])
def test_weights_come_in_several_wrappings_and_give_the_same_figures(dinov2, here, run, name):
    tensors = teacher(run)
    backbone = {key.removeprefix("backbone."): t for key, t in tensors.items() if key.startswith("backbone.")}
    file = here / "w.pth"
    match name:
        case "teacher":
            torch.save(tensors, file)
        case "bare backbone":
            torch.save(backbone, file)
        case "wrapped":
            torch.save({"model": {f"module.teacher.{key}": t for key, t in tensors.items()}}, file)
        case "safetensors":
            file = newest_teacher(run).with_name("backbone.safetensors")
    expected = figures(dinov2("eval", "knn", "--model", run, *SETS).out)
    ended = dinov2("eval", "knn", "--model", file, *SETS)
    # A bare file does not say with which mean, deviation and position rule it was trained: those of the release.
    assert ended.code == 0
    assert figures(ended.out) == expected


def test_an_image_that_cannot_be_read_is_left_out_and_mentioned(dinov2, here, run):
    pictures(here / "set", n=20, classes=2)
    (here / "set" / "class0" / "cut.png").write_bytes(b"\x89PNG no image")
    ended = dinov2("eval", "knn", "--model", run, "--train-dataset", "set", "--val-dataset", "set", "--nb-knn", "3")
    assert ended.code == 0
    assert "2 images could not be read and were left out" in ended.out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--train-dataset", "flat"), "flat has no labels, which an evaluation needs; sort the images into"),
        (("--val-dataset", "flat"), "flat has no labels"),
        (("--val-dataset", "nowhere"), "'nowhere'"),
        (("--val-dataset", "empty"), "no image was found in"),
        (("--temperature", "0"), "the temperature is 0.0; write a number above 0"),
        (("--temperature", "-1"), "the temperature is -1.0"),
        (("--temperature", "nan"), "the temperature is nan"),
        (("--n-per-class-list", "0"), "0 images per class were asked for"),
        (("--num-workers", "-1"), "the number of workers is -1; write 0"),
        (("--num-workers", "99999999999"), "the number of workers is 99999999999; write 1024 or less"),
        (("--threads", "99999999999"), "the number of threads is 99999999999; write 1024 or less"),
        (("--device", "tpu"), "no device is called 'tpu'"),
        (("--device", "cuda:99"), "the device 'cuda:99'"),
        (("--output-dir", "file"), "the output folder file is a file; choose another path"),
        (("--output-dir", "file/below"), "is a file; choose another"),
        (("--config-file", "nowhere.yaml"), "there is no file and no packaged config called 'nowhere.yaml'"),
        (("--model", ""), "no model was named; give a release's name, a weight file or a run's folder"),
        (("--model", "nowhere.pth"), "there is no weight file nowhere.pth; check the path"),
        (("--model", "dinov2_vits14_regs"), "the nearest is 'dinov2_vits14_reg'"),
        (("--model", "dinov2_vits14_nyu_dpt_head"), "is a depth head, which does not load as a model"),
        (("--model", "flat"), "flat holds no exported teacher"),
    ],
)
def test_wrong_input_is_one_sentence_before_any_work(dinov2, here, run, words, sentence, monkeypatch):
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    pictures(here / "flat")
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    before = contents(here)
    ended = dinov2("eval", "knn", "--model", run, *SETS, *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before


def test_processes_without_a_launcher_are_refused(dinov2, run, here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = dinov2("eval", "knn", "--model", run, *SETS)
    assert ended.code == 2 and "start with torchrun, which sets all six" in only_sentence(ended)
    assert list(here.iterdir()) == []


def test_an_output_folder_without_permission_is_refused_before_any_work(dinov2, here, run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for option in (("--output-dir", "out"), ()):
        ended = dinov2("eval", "knn", "--model", run, *SETS, *option)
        assert ended.code == 2
        assert "(Permission denied); choose another --output-dir" in only_sentence(ended)
    assert list(here.iterdir()) == []


# Files that are no backbone, or another one.


def save_bytes(data: bytes):
    return lambda run, file: file.write_bytes(data)


def save_part(share: float, suffix: str = ".pth"):
    def save(run: Path, file: Path) -> None:
        source = newest_teacher(run) if suffix == ".pth" else newest_teacher(run).with_name("backbone.safetensors")
        data = source.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return save


def save_object(value):
    return lambda run, file: torch.save(value, file)


def save_teacher_with(**changes):
    def save(run: Path, file: Path) -> None:
        content = torch.load(newest_teacher(run), weights_only=True)
        del content["checksum"]  # of a file by another hand, which is intact
        torch.save({**content, **changes}, file)

    return save


NO_FILE = "is no weight file (or only a part of one); download or copy it again"
WITH_CODE = "holds Python objects besides tensors and was refused"


@pytest.mark.parametrize(
    "name, save, sentence",
    [
        ("w.pth", save_part(0.5), NO_FILE),
        ("w.pth", save_part(0.99), NO_FILE),
        ("w.pth", save_bytes(b""), NO_FILE),
        ("w.pth", save_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"), "but a web page"),
        ("w.pth", save_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "fetch it with: git lfs pull"),
        ("w.safetensors", save_part(0.5, ".safetensors"), "is only a part of a weight file ("),
        ("w.safetensors", save_bytes(b"<html>"), "but a web page"),
        ("w.pth", save_object({"teacher": Code()}), WITH_CODE),
        ("w.pth", save_bytes(pickle.dumps({"teacher": Code()})), WITH_CODE),
        ("w.pth", save_object(torch.nn.Linear(2, 2)), WITH_CODE),
        ("w.pth", save_object([torch.zeros(2)]), "holds a list, not a dictionary of tensors"),
        ("w.pth", save_object({}), "w.pth holds no DINOv2 backbone"),
        ("w.pth", save_object({"weight": torch.zeros(9, 4), "bias": torch.zeros(9)}), "a linear head and no backbone"),
        ("w.pth", save_teacher_with(model={"version": 2, "embed_dim": 64}), "has version 2, this package reads 1"),
        ("w.pth", save_teacher_with(model={"version": 1, "embed_dim": 64}), "describes no model"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_backbone_is_one_sentence(dinov2, here, run, name, save, sentence):
    save(run, here / name)
    before = contents(here)
    ended = dinov2("eval", "knn", "--model", name, *SETS)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before  # so no code has run either


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("student.num_register_tokens=4",), "missing register_tokens. The file is of a model without registers"),
        (("student.ffn_layer=swiglufused",), "One of the two has a SwiGLU feed-forward network"),
        (("student.depth=3",), "The depths differ"),
        (("student.depth=1",), "The depths differ"),
        (("student.patch_size=4",), "patch_embed.proj.weight is [64, 3, 8, 8], wanted [64, 3, 4, 4]"),
        (("student.embed_dim=128",), "wanted [1, 1, 128]"),
        (("student.in_chans=1", "crops.mean=[0.5]", "crops.std=[0.5]"), "wanted [64, 1, 8, 8]"),
        (("student.layerscale=null",), "One of the two has no LayerScale"),
        (("student.qkv_bias=false",), "qkv_bias"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused_with_the_cause(dinov2, here, run, overrides, sentence):
    (here / "c.yaml").write_text(to_yaml(load_config(str(run / "config.yaml"), overrides)))
    ended = dinov2("eval", "knn", "--model", run, "--config-file", "c.yaml", *SETS)
    assert ended.code == 2
    assert sentence in only_sentence(ended)


def test_a_run_s_own_configuration_fits(dinov2, run):
    ended = dinov2("eval", "knn", "--model", run, "--config-file", run / "config.yaml", *SETS)
    assert ended.code == 0


# Progress.


class Screen:
    """Standard error that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_only_and_the_cursor_comes_back(dinov2, run, monkeypatch):
    assert dinov2("eval", "knn", "--model", run, *SETS, "--no-cache").err == ""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    words = ["eval", "knn", "--model", str(run), *SETS, "--no-cache"]
    assert main(words) == 0
    assert "features of toy:split=TRAIN:n=40" in screen.text and "40/40" in screen.text
    assert screen.text.count("\x1b[?25l") == screen.text.count("\x1b[?25h") > 0

    def interrupted(*arguments, progress, **options):
        progress(1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "extract_features", interrupted)
    assert main(words) == 130
    assert screen.text.count("\x1b[?25l") == screen.text.count("\x1b[?25h")
