"""Small files of a run that are damaged: every command that reads them goes on without, or says so in one sentence."""

import shutil
from pathlib import Path

import pytest

from dinov2.apps.doctor import examine_run, in_words, run_log
from dinov2.apps.training_evaluations import KNN_CURVE, accuracy_evaluation
from dinov2.configs import load_config
from dinov2.errors import DataError, DinoError
from dinov2.report.training import write_report
from dinov2.train.train import train
from dinov2.whole_files import read_json
from tests.train.tiny_run import tiny_config

FILES = (
    "config.yaml",
    "training_metrics.json",
    "evaluation_metrics.json",
    "knn_curve.json",
    "skipped_steps.json",
    "summary.json",
    "results_eval_knn.json",
    "unreadable_images.json",
    "logs/log.txt",
    "report_data/neighbours.json",
)
DEEP = 5_000
CONTENTS = {
    "empty": b"",
    "zeros": bytes(500),
    "no text": bytes(range(256)),
    "nested deep": b"[" * DEEP + b"]" * DEEP,
    "objects nested deep": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "null": b"null\n",
    "number": b"5\n",
    "text": b'"text"\n',
    "long number": b'{"iteration": ' + b"9" * 5000 + b"}\n",
    "list": b"[1, null, []]\n",
    "object": b'{"a": 1}\n',
    "objects of other types": b'[{"iteration": "x", "top1": [], "image": 3, "query": 1}]\n',
    "infinite": b'[{"iteration": Infinity, "top1": NaN}]\n',
    "row of other types": b'{"iteration": [], "loss": "x", "count": {}, "images": 5, "rows": {"a": 1}, "task": 3}\n',
    "odd numbers": b'{"iteration": 1e400, "loss": NaN, "count": -1e400, "images": [[]], "untrained": NaN}\n',
    "large numbers": b'{"iteration": 1%s, "loss": 1%s, "raw_pixels": 1%s}\n' % ((b"0" * 400,) * 3),
    "negative": b'{"iteration": -5, "loss": -1, "count": -2, "seconds": -3, "trained": -4}\n',
    "sections of other types": b"student: 5\ntrain: [1]\ncrops: text\nseconds: x\nenvironment: 3\nrows: 4\n",
    "sections with other values": b"student: {arch: [1], patch_size: {a: 1}}\ntrain: {dataset_path: 5}\n",
    "anchor to itself": b"a: &a [*a]\n",
}  # fmt: skip


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.parametrize("name", FILES)
def test_doctor_and_report_say_at_most_one_sentence(copy, name, monkeypatch):
    if name != "config.yaml":  # reading all keys again and again would take most of the time
        cfg = load_config(copy / "config.yaml")
        monkeypatch.setattr(run_log, "load_config", lambda path: cfg)
        (copy / "config.yaml").write_text("student: {arch: vit_nano}")
    file = copy / name
    file.parent.mkdir(exist_ok=True)
    sentences, tracebacks = [], []
    for what, content in CONTENTS.items():
        file.write_bytes(content)
        for command in (lambda: in_words(examine_run(copy)), lambda: write_report(copy)):
            try:
                command()
            except DinoError as error:
                sentences.append(str(error))
            except Exception as error:
                tracebacks.append(f"{what}: {error!r}")
    assert tracebacks == []
    assert [text for text in sentences if "\n" in text] == []


@pytest.mark.parametrize("name", ["unreadable_images.json", KNN_CURVE, "skipped_steps.json", "evaluation_metrics.json"])
@pytest.mark.parametrize("what", ["nested deep", "objects of other types"])
def test_a_training_goes_on_or_says_why_not(tmp_path, name, what):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_bytes(CONTENTS[what])
    cfg = tiny_config("evaluation.knn_train_dataset=toy:n=8", "evaluation.knn_val_dataset=toy:n=8")
    if name == "skipped_steps.json" and what == "objects of other types":
        with pytest.raises(DataError, match=rf"line 1 of .*{name} is not a row of metrics; delete the line to go on$"):
            train(cfg, run, max_steps=1, evaluate=accuracy_evaluation(cfg), announce=lambda text: None)
    else:
        train(cfg, run, max_steps=1, evaluate=accuracy_evaluation(cfg), announce=lambda text: None)


def test_the_one_reader_of_small_json_files(tmp_path):
    file = tmp_path / "file.json"
    for content, message in {
        b"": "cannot be read .*; restore it, or remove it to go on without it$",
        CONTENTS["nested deep"]: "cannot be read .*recursion",
        CONTENTS["long number"]: "cannot be read",
        b"\xff\xfe\x00": "cannot be read",
        b"null": "holds a JSON NoneType instead of a dict",
        b"[]": "holds a JSON list instead of a dict",
    }.items():
        file.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            read_json(file, dict)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"\(No such file or directory\)"):
        read_json(tmp_path / "none.json", dict)
    with pytest.raises(DataError, match="is no regular file"):
        read_json(tmp_path, dict)
    file.write_bytes(b'{"a": 1}')
    assert read_json(file, dict) == {"a": 1}
