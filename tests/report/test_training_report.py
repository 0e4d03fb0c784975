import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from dinov2.encode.stream import Features
from dinov2.errors import DataError
from dinov2.eval.result import Result, write_results
from dinov2.report import write_report
from dinov2.report.pictures import write_gallery
from dinov2.report.run_record import read_run

VOID = {"meta", "link", "img"}


class Structure(HTMLParser):
    """Checks that tags nest, and notes every address and identifier."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.ids, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag == "path"  # closed in itself

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def parsed(path):
    structure = Structure()
    structure.feed(path.read_text(encoding="utf-8"))
    assert structure.open == []
    return structure, " ".join(structure.texts)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my <run>"
    folder.mkdir()
    rows = [
        {
            "iteration": i,
            "total_loss": 8 - i / 100,
            "dino_global_crops_loss": 4 - i / 200,
            "dino_local_crops_loss": 4 - i / 200,
            "ibot_loss": 0.0,
            "koleo_loss": -1.0,
            "lr": 1e-3,
            "mom": 0.99,
            "iter_time": 0.1,
            "data_time": 0.01,
            "grad_norm_backbone": 2.0,
            "images_per_second": 600.0,
        }
        for i in range(0, 100, 10)
    ]
    (folder / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        "MODEL: {WEIGHTS: ''}\nstudent: {arch: vit_nano, patch_size: 4, drop: null}\ntrain: {dataset_path: 'a&b'}\n"
    )
    (folder / "knn_curve.json").write_text(json.dumps([{"iteration": 49, "top1": 40.0}, {"iteration": 99, "top1": 52}]))
    (folder / "summary.json").write_text(
        json.dumps({"raw_pixels": 41.0, "untrained": 60.0, "trained": 55.5, "seconds": 200.4, "note": "x"})
    )
    (folder / "unreadable_images.json").write_text(
        json.dumps({"count": 1, "images": [{"path": "b/<img>.jpg", "reason": "truncated"}]})
    )
    write_results(
        folder / "results_eval_knn.json",
        [
            Result(
                task="knn",
                metric="top-1",
                value=55.5,
                ci=(53.1, 57.9),
                k=20,
                n=2000,
                dataset="toy",
                notes=("a <note>",),
            )
        ],
    )
    features = Features(torch.eye(3), torch.tensor([0, 1, 2]), ("<cat>", "dog", "bird"))
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    write_gallery(folder, features, features, train_image=lambda i: picture, val_image=lambda i: picture, k=2)
    png = (folder / "report_data" / "neighbours" / "query_0.png").read_bytes()
    (folder / "report_data" / "pca").mkdir()
    for name in ("step_9", "step_99", "images"):
        (folder / "report_data" / "pca" / f"{name}.png").write_bytes(png)
    return folder


def test_the_page_is_well_formed_and_needs_nothing_beside_itself(run):
    structure, _ = parsed(write_report(run))
    anchors = {address[1:] for address in structure.addresses if address.startswith("#")}
    assert anchors == set(structure.ids)
    outside = [address for address in structure.addresses if not address.startswith(("#", "data:"))]
    assert outside == []
    page = (run / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page)
    assert "default-src 'none'; img-src data:" in page  # nor would the browser load anything


def test_the_page_shows_what_the_run_holds(run):
    structure, text = parsed(write_report(run))
    for expected in (
        "my <run>",
        "vit_nano, patch 4",
        "a&b",
        "3 min 20 s",
        "+14.5 points",
        "against raw pixels",
        "-4.5 points",
        "iteration 99",
        "<cat>",
        "b/<img>.jpg",
        "53.1 – 57.9",
        "a <note>",
        "Not part of this training: iBOT, masked patches.",
    ):
        assert expected in text, expected
    assert sum(address.startswith("data:image/png") for address in structure.addresses) == 3 + 3 * 3


def test_nothing_from_a_run_becomes_markup(run):
    page = write_report(run).read_text()
    assert "<run>" not in page and "<cat>" not in page and "<img>" not in page and "<note>" not in page


def test_right_and_wrong_neighbours_are_told_apart_by_class_and_in_words(run):
    page = write_report(run).read_text()
    assert page.count('class="right"') == 3 and page.count('class="wrong"') == 3
    assert "3 of these 6 neighbours are of the right class" in page


def test_without_a_summary_the_last_measured_accuracy_is_the_headline(run):
    (run / "summary.json").unlink()
    _, text = parsed(write_report(run))
    assert "52.0" in text
    assert "measured during the training, after iteration 99" in text


def test_versions_are_those_noted_with_the_figures(run):
    (run / "summary.json").write_text(json.dumps({"trained": 50.0, "environment": {"torch": "9.8.7"}}))
    _, text = parsed(write_report(run))
    assert "9.8.7" in text and "As noted with the figures." in text


def test_every_section_says_in_words_when_it_has_nothing(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    _, text = parsed(write_report(tmp_path))
    for expected in (
        "has no evaluation (summary.json or knn_curve.json)",
        "No accuracy was measured",
        "No pictures of patch features",
        "No gallery",
        "no training log",
        "no configuration",
        "No evaluation has written",
        "No image was reported unreadable",
    ):
        assert expected in text, expected
    assert "torch" in text  # versions are those of now


def test_a_broken_file_costs_its_section_alone_and_is_named(run):
    (run / "knn_curve.json").write_text("{broken")
    (run / "report_data" / "pca" / "step_99.png").write_bytes(b"no picture")
    _, text = parsed(write_report(run))
    assert "knn_curve.json cannot be used" in text
    assert "report_data/pca cannot be used: step_99.png is neither PNG nor JPEG" in text
    assert "+14.5 points" in text


def test_a_run_that_was_cut_off_while_it_wrote_a_line_is_shown_up_to_there(run):
    with (run / "training_metrics.json").open("a") as file:
        file.write('{"iteration": 100, "total_l')
    record = read_run(run)
    assert record.problems == []
    assert record.metrics["total_loss"][-1] == (90, pytest.approx(7.1))


def test_losses_that_are_not_finite_leave_a_page(run):
    with (run / "training_metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 100, "total_loss": math.nan}) + "\n")
    parsed(write_report(run))


def test_of_many_strips_some_at_even_distances_are_shown(run):
    source = (run / "report_data" / "pca" / "step_9.png").read_bytes()
    for i in range(200, 260):
        (run / "report_data" / "pca" / f"step_{i}.png").write_bytes(source)
    text = parsed(write_report(run))[1]
    shown = [int(number) for number in re.findall(r"iteration (\d+)", text)]
    assert len(shown) == 10
    assert (shown[0], shown[-1]) == (9, 259)


def test_the_page_can_be_written_elsewhere(run, tmp_path):
    path = write_report(run, out=tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html" and path.is_file()
    assert not (run / "report.html").exists()
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds nothing of a training run"):
        write_report(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
