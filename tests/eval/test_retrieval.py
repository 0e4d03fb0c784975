"""Retrieval against cases computed by hand, brute force, scikit-learn, and pickles made to deceive."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dinov2.errors import ConfigError, DataError
from dinov2.eval.retrieval import (
    QueryTruth,
    average_precision,
    evaluate_retrieval,
    global_average_precision,
    precision_at,
    rank_gallery,
    truth_by_class,
)
from dinov2.eval.revisited import evaluate_revisited, read_revisited, write_revisited

# Similarities to the query (1, 0) fall from image to image.
ANGLES = torch.tensor([0.1, 0.4, 0.7, 1.0])
GALLERY = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
QUERY = torch.tensor([[3.0, 0.0]])


def truth(positives, ignored=()):
    return QueryTruth(torch.tensor(positives, dtype=torch.int64), torch.tensor(ignored, dtype=torch.int64))


def random_features(n, seed, width=6):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def value_of(rows, metric, **settings):
    (row,) = [row for row in rows if row.metric == metric and settings.items() <= dict(row.settings).items()]
    return row.value


def test_positives_at_ranks_0_and_2_of_4_have_the_average_precision_computed_by_hand():
    (ranking,) = rank_gallery(QUERY, GALLERY, [truth([0, 2])])
    assert ranking.ranks.tolist() == [0, 2]
    assert average_precision(ranking.ranks, precision="trapezoid") == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(ranking.ranks) == pytest.approx((1 + 2 / 3) / 2)


def test_an_ignored_image_between_them_closes_the_gap():
    (ranking,) = rank_gallery(QUERY, GALLERY, [truth([0, 2], [1])])
    assert ranking.ranks.tolist() == [0, 1]
    assert average_precision(ranking.ranks, precision="trapezoid") == 1


def test_the_most_similar_image_counts_when_those_before_it_are_ignored():
    (ranking,) = rank_gallery(QUERY, GALLERY, [truth([3], [0, 1])])
    assert ranking.ranks.tolist() == [1]
    assert ranking.confidence == pytest.approx(float(ANGLES[2].cos()))


def test_of_equal_similarities_the_lower_number_comes_first():
    (ranking,) = rank_gallery(QUERY, GALLERY[[1, 0, 0, 0]], [truth([2, 3])])
    assert ranking.ranks.tolist() == [1, 2]


def test_ranks_equal_those_of_a_list_from_which_ignored_images_were_taken_out():
    generator = torch.Generator().manual_seed(3)
    queries, gallery = random_features(20, 0), random_features(60, 1)
    order = torch.rand(20, 60, generator=generator).argsort(dim=1)
    one = [truth(row[:7].tolist(), row[7:15].tolist()) for row in order]
    for number, ranking in enumerate(rank_gallery(queries, gallery, one)):
        similarities = torch.cosine_similarity(queries[number : number + 1], gallery)
        ignored = one[number].ignored.tolist()
        listed = [i for i in similarities.argsort(descending=True).tolist() if i not in ignored]
        assert ranking.ranks.tolist() == [r for r, i in enumerate(listed) if i in one[number].positives.tolist()]
        assert ranking.confidence == pytest.approx(float(similarities[listed[0]]), abs=1e-6)


def test_the_step_average_precision_equals_scikit_learns():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    queries, gallery = random_features(10, 4), random_features(80, 5)
    relevant = torch.rand(10, 80, generator=torch.Generator().manual_seed(6)) < 0.1
    rankings = rank_gallery(queries, gallery, [QueryTruth(row.nonzero().squeeze(1)) for row in relevant])
    similarities = normalize(queries, dim=1) @ normalize(gallery, dim=1).T
    for ranking, right, scores in zip(rankings, relevant, similarities, strict=True):
        assert average_precision(ranking.ranks) == pytest.approx(sklearn_metrics.average_precision_score(right, scores))


def test_precision_among_the_first_k_stops_at_the_last_positive():
    ranks = torch.tensor([0, 2])
    assert precision_at(ranks, 1) == 1
    assert precision_at(ranks, 2) == 0.5
    assert precision_at(ranks, 10) == pytest.approx(2 / 3)


def test_gap_is_that_of_a_hand_made_list():
    # By confidence: right, wrong (a distractor), right, wrong; three queries have a match.
    confidences, correct = torch.tensor([0.2, 0.9, 0.5, 0.7]), torch.tensor([False, True, True, False])
    assert global_average_precision(confidences, correct, n_with_match=3) == pytest.approx((1 + 2 / 3) / 3)


def test_queries_without_a_right_image_are_left_out_and_noted():
    rows = evaluate_retrieval(QUERY.expand(2, 2), GALLERY, [truth([0]), truth([])], ks=(1,))
    assert value_of(rows, "mAP") == value_of(rows, "recall@1") == value_of(rows, "GAP") == 100
    assert rows[0].n == 1
    assert "1 queries have no right image" in rows[0].notes[0]


def test_recall_is_the_share_of_queries_that_find_a_right_image_in_time():
    rows = evaluate_retrieval(QUERY.expand(4, 2), GALLERY, [truth([n]) for n in range(4)], ks=(1, 2, 10))
    assert [value_of(rows, f"recall@{k}") for k in (1, 2, 10)] == [25, 50, 100]
    assert rows[0].ci[0] < rows[0].value < rows[0].ci[1]


def test_by_class_all_others_of_the_class_are_right_and_the_image_itself_is_ignored():
    labels = torch.tensor([0, 1, 0, -1])
    one, two, three, four = truth_by_class(labels, labels, same_image=torch.tensor([0, 1, -1, 3]))
    assert (one.positives.tolist(), one.ignored.tolist()) == ([2], [0])
    assert (two.positives.tolist(), two.ignored.tolist()) == ([], [1])
    assert (three.positives.tolist(), three.ignored.tolist()) == ([0, 2], [])
    assert (four.positives.tolist(), four.ignored.tolist()) == ([], [3])


@pytest.mark.parametrize(
    ("queries", "gallery", "one", "message"),
    [
        (QUERY, GALLERY[:, :1], [truth([0])], "same width"),
        (QUERY, GALLERY, [], "truth of 0"),
        (QUERY, GALLERY[:0], [truth([])], "no images"),
        (QUERY * torch.nan, GALLERY, [truth([0])], "diverged"),
        (QUERY, GALLERY, [truth([4])], "another gallery"),
        (QUERY, GALLERY, [truth([0, 0])], "twice"),
        (QUERY, GALLERY, [truth([0], [0])], "twice"),
        (QUERY, GALLERY, [truth([])], "no query has a right image"),
    ],
)
def test_what_cannot_be_ranked_is_refused(queries, gallery, one, message):
    with pytest.raises(DataError, match=message):
        evaluate_retrieval(queries, gallery, one)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="from the first"):
        evaluate_retrieval(QUERY, GALLERY, [truth([0])], ks=(0,))
    with pytest.raises(ConfigError, match="step or trapezoid"):
        evaluate_retrieval(QUERY, GALLERY, [truth([0])], precision="interpolated")
    with pytest.raises(DataError, match="not defined"):
        global_average_precision(torch.ones(1), torch.ones(1) > 0, n_with_match=0)


# The revisited protocols


def document(**lists):
    entry = {"bbx": [1.0, 2.0, 30.5, 40.0], "easy": [0], "hard": [2], "junk": [1], **lists}
    return {"imlist": ["a", "b", "c", "d"], "qimlist": ["q"], "gnd": [entry]}


def written(tmp_path, value, protocol=2):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def test_the_three_protocols_have_the_figures_computed_by_hand(tmp_path):
    read = read_revisited(written(tmp_path, document()))
    rows = evaluate_revisited(QUERY, GALLERY, read)
    # Easy: image 0 is first of what is left. Medium: images 0 and 2 are first. Hard: image 2 is.
    assert [value_of(rows, "mAP", protocol=name) for name in ("easy", "medium", "hard")] == [100, 100, 100]
    turned = evaluate_revisited(QUERY, GALLERY.flip(0), read)  # image 3 now comes first
    assert value_of(turned, "mAP", protocol="hard") == pytest.approx(100 * (0 + 1 / 2) / 2)
    # Medium: right at ranks 1 and 2 behind image 3.
    expected = ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert value_of(turned, "mAP", protocol="medium") == pytest.approx(100 * expected)
    assert value_of(turned, "mP@5", protocol="medium") == pytest.approx(200 / 3)


def test_a_protocol_without_a_right_image_has_no_rows(tmp_path):
    rows = evaluate_revisited(QUERY, GALLERY, read_revisited(written(tmp_path, document(easy=[], junk=[]))))
    assert {row.settings["protocol"] for row in rows} == {"medium", "hard"}


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("kind", [np.int64, np.dtype(">i4"), np.uint8])
def test_lists_may_be_arrays_of_numbers(tmp_path, kind, protocol):
    value = document(easy=np.array([0, 3], dtype=kind), bbx=np.array([1, 2, 30.5, 40]))
    value["imlist"] = np.array(value["imlist"], dtype=object)
    (query,) = read_revisited(written(tmp_path, value, protocol)).queries
    assert (query.easy, query.box) == ((0, 3), (1, 2, 30.5, 40))
    assert np.array(1).astype(np.int64).dtype == np.dtype("int64")  # reading another byte order changed no type


def test_numbers_may_be_numpy_scalars(tmp_path):
    value = document(easy=[np.int64(0)], bbx=[np.float64(1), np.float64(2), np.float32(30.5), np.int32(40)])
    (query,) = read_revisited(written(tmp_path, value)).queries
    assert (query.easy, query.box) == ((0,), (1, 2, 30.5, 40))


def test_what_is_written_as_json_is_read_back(tmp_path):
    read = read_revisited(written(tmp_path, document(bbx=None)))
    path = write_revisited(read, tmp_path / "gnd.json")
    assert read_revisited(path) == read
    assert json.loads(path.read_text())["gnd"][0]["easy"] == [0]


class Command:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    target = str(tmp_path / "made")
    with pytest.raises(DataError, match="mkdir, which no ground truth needs"):
        read_revisited(written(tmp_path, document(easy=Command(target))))
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"imlist": []}, "qimlist"),
        ([1, 2], "expected imlist"),
        (document(easy=[4]), "gallery of 4"),
        (document(easy=[1]), "two of its lists"),
        (document(easy=[0.5]), "no image number"),
        (document(bbx=[3, 3, 3, 9]), "is empty"),
        ({**document(), "qimlist": []}, "0 queries and 1 entries"),
        (document(easy=np.array([0], dtype="datetime64[s]")), "no list of numbers"),
    ],
)
def test_a_file_that_is_no_ground_truth_is_refused(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        read_revisited(written(tmp_path, value))


def test_a_file_that_is_no_pickle_is_refused(tmp_path):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(b"\x80\x02]q\x01")
    with pytest.raises(DataError, match="neither a pickle nor JSON"):
        read_revisited(path)
    with pytest.raises(DataError, match="check the path"):
        read_revisited(tmp_path / "missing.pkl")
