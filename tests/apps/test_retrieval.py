"""Retrieval as a function: folders of classes, a gallery that holds the queries, and a tiny revisited benchmark."""

import io
import json
import pickle
import shutil

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.page import _retrieval_record_of, write_retrieval_page
from dinov2.apps.evaluation.retrieval import retrieval
from dinov2.errors import ConfigError, DataError
from dinov2.pretrained import load
from tests.runs import pictures


def values(report):
    return {(row.metric, row.settings.get("protocol")): row.value for row in report.rows}


def class_tokens(run, paths, box=None):
    loaded = load(run)
    images = [Image.open(path).convert("RGB") for path in paths]
    images = images if box is None else [image.crop(box) for image in images]
    batch = torch.stack([loaded.transform(image) for image in images])
    return normalize(loaded.encode(batch).cls.float(), dim=1)


def test_each_image_looks_for_the_others_of_its_class(run, here):
    pictures(here / "photos", n=12, classes=3)
    report = retrieval(EvalConfig(model=run, output_dir="out", use_cache=False), query_dataset="photos")
    paths = sorted((here / "photos").rglob("*.png"))
    tokens = class_tokens(run, paths)
    similarities = (tokens @ tokens.T).fill_diagonal_(-2)
    hits = [paths[int(near)].parent == path.parent for path, near in zip(paths, similarities.argmax(1), strict=True)]
    assert values(report)["recall@1", None] == pytest.approx(100 * sum(hits) / 12)
    written = json.loads((here / "out" / "results_eval_retrieval.json").read_text())
    assert [row["value"] for row in written["rows"]] == [row.value for row in report.rows]
    assert written["rows"][0]["settings"]["n_gallery"] == 12
    assert str(here) not in json.dumps(written)


def test_a_query_that_lies_in_the_gallery_does_not_find_itself(run, here):
    pictures(here / "photos", n=12, classes=3)
    inside = retrieval(EvalConfig(model=run), query_dataset="photos/", gallery_dataset=str(here / "photos"))
    assert values(inside) == values(retrieval(EvalConfig(model=run), query_dataset="photos"))


def test_classes_of_query_and_gallery_are_matched_by_name(run, here):
    pictures(here / "gallery", n=12, classes=3)
    shutil.copytree(here / "gallery" / "class2", here / "query" / "class2")
    report = retrieval(EvalConfig(model=run), query_dataset="query", gallery_dataset="gallery")
    assert values(report)["recall@1", None] == 100  # copies are no longer the same files


def test_a_revisited_benchmark_is_cropped_ranked_and_measured(run, here):
    pictures(here / "images" / "jpg", n=8, size=40)
    names = [f"{number:03}" for number in range(7)]
    box = (4.0, 6.0, 36.0, 40.0)
    truth = {
        "imlist": names,
        "qimlist": ["007"],
        "gnd": [{"bbx": list(box), "easy": [3], "hard": [5, 6], "junk": [0]}],
    }
    (here / "gnd_tiny.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    report = retrieval(EvalConfig(model=run, output_dir="out"), ground_truth="gnd_tiny.pkl", images="images")
    folder = here / "images" / "jpg"
    query = class_tokens(run, [folder / "007.png"], box)
    order = (query @ class_tokens(run, [folder / f"{name}.png" for name in names]).T)[0].argsort(descending=True)
    rank = [int(number) for number in order if number not in (0, 5, 6)].index(3)
    expected = (1 + 1) / 2 if rank == 0 else (0 + 1 / (rank + 1)) / 2
    assert values(report)["mAP", "easy"] == pytest.approx(100 * expected)
    assert {row.dataset for row in report.rows} == {"tiny"}
    assert not any(row.metric == "GAP" for row in report.rows)
    again = retrieval(EvalConfig(model=run), ground_truth=here / "out" / "ground_truth.json", images="images")
    assert values(again) == values(report)


def test_the_page_shows_what_is_nearest_without_the_query_and_marks_it_by_class(run, here):
    pictures(here / "photos", n=12, classes=3)
    report = retrieval(EvalConfig(model=run, output_dir="out"), query_dataset="photos")
    paths = sorted((here / "photos").rglob("*.png"))
    tokens = class_tokens(run, paths)
    similarities = (tokens @ tokens.T).fill_diagonal_(-2)
    record = _retrieval_record_of(report)
    (group,) = record.groups
    assert [row.shots[0].title for row in group.rows] == [path.name for path in paths]
    for own, path, row in zip(similarities, paths, group.rows, strict=True):
        order = [paths[int(number)] for number in own.argsort(descending=True)[:10]]
        assert [shot.title for shot in row.shots[1:]] == [one.name for one in order]
        assert [shot.kind for shot in row.shots[1:]] == [
            "right" if one.parent == path.parent else "wrong" for one in order
        ]
        assert row.shots[1].note == f"{float(own.max()):.2f}"
    mean = sum(record.precisions) / len(record.precisions)
    assert 100 * mean == pytest.approx(values(report)["mAP", None])


def test_of_many_queries_the_page_shows_some_and_the_hardest(run, here):
    report = retrieval(EvalConfig(model=run, output_dir="out"), query_dataset="toy:split=TRAIN:n=60")
    some, hardest = _retrieval_record_of(report).groups
    assert len(some.rows) == len(hardest.rows) == 10
    precisions = [int(row.remark.split()[2]) for row in hardest.rows]
    assert precisions == sorted(precisions)
    shown = [row.shots[0].title for group in (some, hardest) for row in group.rows]
    assert len(set(shown)) == 20
    assert write_retrieval_page(report) == report.output_dir / "results_eval_retrieval.html"


def test_the_page_of_a_benchmark_leaves_junk_out_and_shows_the_query_s_box(run, here):
    pictures(here / "images", n=8, size=40)
    names = [f"{number:03}" for number in range(7)]
    truth = {
        "imlist": names,
        "qimlist": ["007"],
        "gnd": [{"bbx": [0, 0, 20, 40], "easy": [3], "hard": [5], "junk": [0, 1]}],
    }
    (here / "gnd_tiny.pkl").write_bytes(pickle.dumps(truth))
    record = _retrieval_record_of(retrieval(EvalConfig(model=run), ground_truth="gnd_tiny.pkl", images="images"))
    assert list(record.figures) == ["easy", "medium", "hard"]
    ((query, *found),) = [row.shots for row in record.groups[0].rows]
    assert Image.open(io.BytesIO(query.picture)).size == (20, 40)
    assert {shot.name for shot in found} == {f"00{number}.png" for number in (2, 3, 4, 5, 6)}
    assert {shot.name for shot in found if shot.kind == "right"} == {"003.png", "005.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of the two"),
        ({"query_dataset": "photos", "ground_truth": "gnd.pkl", "images": "."}, "one of the two"),
        ({"ground_truth": "gnd.pkl"}, "belong together"),
        ({"query_dataset": "photos", "images": "."}, "belong together"),
        ({"ground_truth": "gnd.pkl", "images": ".", "gallery_dataset": "photos"}, "its own gallery"),
        ({"query_dataset": "photos", "ks": (0,)}, "from the first"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused_before_the_model_is_read(here, arguments, message):
    with pytest.raises(ConfigError, match=message):
        retrieval(EvalConfig(model="no such model"), **arguments)


def test_an_image_that_the_benchmark_lacks_is_named(run, here):
    pictures(here / "images", n=2)
    truth = {"imlist": ["000", "missing"], "qimlist": ["001"], "gnd": [{"easy": [0], "hard": [], "junk": []}]}
    (here / "gnd.pkl").write_bytes(pickle.dumps(truth))
    with pytest.raises(DataError, match="missing of the ground truth is not in images"):
        retrieval(EvalConfig(model=run), ground_truth="gnd.pkl", images="images")
    with pytest.raises(DataError, match="no folder nowhere"):
        retrieval(EvalConfig(model=run), ground_truth="gnd.pkl", images="nowhere")
