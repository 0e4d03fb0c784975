"""Names of folders, files and classes that are not UTF-8 or that the console cannot show: every command takes them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.encode.store import open_features
from tests.apps.test_embed import small
from tests.runs import SMALL, TABLE_FORMATS, only_sentence, pictures

LATIN = os.fsdecode(b"\xe9")  # a byte that begins no character in UTF-8
NAMES = (LATIN, "犬")


@pytest.fixture(params=NAMES, ids=["bytes", "cp1252"])
def name(request, here) -> str:
    """The name of a folder, and in it of a class folder, of images and of one that is broken."""
    name = str(request.param)
    try:
        os.mkdir(here / name)
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    pictures(here / name, n=6, classes=2)
    (here / name / "class1").rename(here / name / f"class {name}")
    (here / name / "class0" / "000.png").rename(here / name / "class0" / f"{name}.png")
    (here / name / f"class {name}" / f"broken {name}.jpg").write_bytes(b"no picture")
    small(here / "m.pth")
    return name


def images(folder: str) -> set[str]:
    return {str(path) for path in Path(folder).rglob("*.png")}


@pytest.mark.parametrize("kind", [*TABLE_FORMATS, "parts"])
def test_features_name_files_that_can_be_opened_again(dinov2, name, kind):
    output = f"{name}.{kind}".removesuffix(".parts")
    output = f"out {name}/{output}"
    words = ("embed", name, "-m", "m.pth", "-o", output, *(("--format", "npz") if kind == "parts" else ()))
    ended = dinov2(*words)
    assert ended.code == 0, ended.err
    assert dinov2(*words).out.startswith("everything was there already")
    stored = open_features(output)
    assert {os.path.join(name, path) for path in stored.read("path")} == images(name)
    assert stored.manifest["class_names"] == sorted(["class0", f"class {name}"])
    assert os.path.samefile(stored.manifest["root"], name)
    (unreadable,) = json.loads(Path(f"{output}.unreadable.json").read_text(encoding="utf-8"))
    assert os.path.isfile(unreadable["path"])
    if kind == "npz":
        assert all(str(path).encode() for path in np.load(output)["path"])
    ended = dinov2("neighbours", output, "-k", "1", "-o", f"{name}.html", "--json", "n.json")
    assert ended.code == 0, ended.err
    page = Path(f"{name}.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 * 6 and "not found" not in page


def test_a_latin_1_list_keeps_paths_and_labels(dinov2, here, name):
    rows = [f"{name}/class0/{name}.png,B{name}r", f"{name}/class {name}/001.png,Ox"]
    (here / "l.csv").write_bytes(os.fsencode("path,label\n" + "\n".join(rows) + "\n"))
    ended = dinov2("embed", "l.csv", "-m", "m.pth", "-o", "l.npz")
    assert ended.code == 0, ended.err
    stored = open_features("l.npz")
    assert stored.read("path").tolist() == [row.partition(",")[0] for row in rows]
    assert stored.manifest["class_names"] == [f"B{name}r", "Ox"]


def test_pages_and_predictions_are_written(dinov2, here, name):
    torch.save({"weight": torch.randn(2, 128), "bias": torch.zeros(2)}, f"{name}.pth")
    picture = f"{name}/class0/{name}.png"
    assert dinov2("viz", picture, "--model", "m.pth", "--size", "32", "-o", f"{name}/v").code == 0
    words = ("classify", name, "--model", "m.pth", "--head", f"{name}.pth")
    assert dinov2(*words, "--json", "c.json").code == 0
    written = json.loads(Path("c.json").read_text(encoding="utf-8"))
    assert images(f"{name}/class0") < {image["path"] for image in written["images"]}
    for target in ("--json", "--csv"):
        ended = dinov2(*words, target, "-")
        assert ended.code == 0 and f"/{name}.png".encode("cp1252", "backslashreplace").decode() in ended.out


@pytest.mark.parametrize("name", NAMES[:1], ids=["bytes"], indirect=True)
def test_a_name_that_a_library_cannot_open_is_refused(dinov2, name):
    pytest.importorskip("onnx")
    ended = dinov2("export", "m.pth", "-o", f"{name}.onnx")
    assert ended.code == 2 and only_sentence(ended).startswith("ONNX Runtime opens names in UTF-8 alone")


def test_evaluations_are_written(dinov2, name):
    sets = ("--train-dataset", name, "--val-dataset", name, "--model", "m.pth")
    ended = dinov2("eval", "knn", *sets, "--nb-knn", "1", "--output-dir", f"out {name}", "--cache-dir", f"cache {name}")
    assert ended.code == 0, ended.err
    rows = json.loads(Path(f"out {name}/results_eval_knn.json").read_text(encoding="utf-8"))["rows"]
    assert {row["dataset"] for row in rows} == {name}


@pytest.mark.parametrize("name", NAMES[:1], ids=["bytes"], indirect=True)
def test_a_run_resumes_and_is_reported_on(dinov2, name):
    words = ("train", "--data", name, "--output-dir", f"run {name}", "--preset", "toy", *SMALL)
    for steps in ("2", "3"):
        ended = dinov2(*words, "evaluation.knn_train_dataset=", "evaluation.knn_val_dataset=", "--max-steps", steps)
        assert ended.code == 0, ended.err
    for command in (("report",), ("doctor",), ("embed", name, "-o", "run.npz", "-m")):
        ended = dinov2(*command, f"run {name}")
        assert ended.err == "" and ended.code in ((0, 1) if command == ("doctor",) else (0,))
