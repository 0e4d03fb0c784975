"""A linear classifier that exists already: its answers are those of the model, its classes those of the images."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dinov2.apps.evaluation.datasets import LabelledDataset, labelled
from dinov2.apps.evaluation.features import FeatureCache, feature_extractor
from dinov2.apps.evaluation.heads import attach_head, mapped, read_class_mapping, score_head, score_head_on
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES
from dinov2.encode.stream import Features, Scoring
from dinov2.errors import DataError, WeightsError
from dinov2.models.heads import LinearHead
from dinov2.pretrained import load
from tests.runs import pictures

TOY = "toy:split=VAL:n=20"


@pytest.fixture
def loaded(run):
    return load(run, device="cpu", precision="fp32")


def head_file(here, width: int, *, n_classes: int = 10, name: str = "head.pth"):
    generator = torch.Generator().manual_seed(3)
    weights = {"weight": torch.randn(n_classes, width, generator=generator), "bias": torch.zeros(n_classes)}
    torch.save(weights, here / name)
    return here / name


def toy() -> list[LabelledDataset]:
    return [LabelledDataset(TOY, labelled(TOY))]


def folder_of_classes(here, names: list[str]) -> LabelledDataset:
    for name in names:
        pictures(here / "set" / name, n=2)
    return LabelledDataset("set", labelled("set"))


def test_answers_are_those_of_the_model_with_its_head(loaded, here):
    attach_head(loaded, head_file(here, 2 * loaded.embed_dim))
    found = score_head_on(
        loaded, feature_extractor(loaded), toy(), FeatureCache(None), settings={"classifier": "mine"}
    )[TOY]
    images = labelled(TOY)
    pixels = torch.stack([loaded.transform(images.get_image(i)) for i in range(len(images))])
    outcome = next(iter(found.outcomes.values()))
    assert_close(outcome.probabilities, loaded.classify(pixels).softmax(dim=1), rtol=1e-4, atol=1e-5)
    expected = (loaded.classify(pixels).argmax(dim=1) == torch.as_tensor(images.get_targets())).double().mean()
    assert found.rows[0].metric == "top-1" and found.rows[0].value == pytest.approx(100 * float(expected))
    assert found.rows[0].settings["classifier"] == "mine" and found.rows[0].settings["layers"] == 1


def test_a_head_of_more_blocks_than_the_model_has_is_refused(loaded, here):
    attach_head(loaded, head_file(here, 5 * loaded.embed_dim))
    assert loaded.n_blocks < 4
    with pytest.raises(WeightsError, match=f"reads 4 blocks, but .* shows {loaded.n_blocks}; give a 1-layer one"):
        score_head_on(loaded, feature_extractor(loaded), toy(), FeatureCache(None))


def test_a_backbone_alone_says_what_is_missing(loaded):
    with pytest.raises(WeightsError, match="a backbone without a classifier; give a --train-dataset to train one"):
        score_head_on(loaded, feature_extractor(loaded), toy(), FeatureCache(None))


def test_a_file_that_is_no_head_is_refused(loaded, run):
    weights = run / "eval" / "training_11" / "backbone.safetensors"
    with pytest.raises(WeightsError, match="it looks like a backbone, whose place is --model"):
        attach_head(loaded, weights)


@pytest.mark.parametrize("column", ["wnid", "name"])
def test_folders_named_by_imagenet_s_identifiers_or_names_are_matched_by_them(here, column):
    numbers = (7, 2, 999)
    one = folder_of_classes(here, [*(getattr(IMAGENET_CLASSES[number], column) for number in numbers), "zzz"])
    head = LinearHead(1, num_classes=1000)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[7] = 9.0  # says class 7 of everything
    labels = torch.as_tensor(one.images.get_targets())
    found = score_head(head, one.with_rules(Features(torch.zeros(8, 2), labels, one.class_names)))
    outcome = next(iter(found.outcomes.values()))
    assert sorted(set(outcome.targets.tolist())) == [-1, 2, 7, 999]
    assert outcome.class_names[7] == IMAGENET_CLASSES[7].name
    assert found.rows[0].value == 25.0
    assert any("2 validation images are of classes without training images" in note for note in found.rows[0].notes)


def test_classes_that_cannot_be_brought_together_are_refused():
    features = Features(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), ("cat", "dog"))
    with pytest.raises(
        DataError, match="the classifier knows 1000 classes and the images have 2, and their names do not"
    ):
        score_head(LinearHead(1, num_classes=1000), features)
    found = score_head(LinearHead(1, num_classes=2), features)
    assert next(iter(found.outcomes.values())).class_names == ("cat", "dog")


def test_an_explicit_mapping_restricts_the_answers_as_the_release_does(here):
    head = LinearHead(2, num_classes=5)
    features = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = head(features)
    np.save(here / "mapping.npy", np.array([4, 1]))
    mapping = read_class_mapping("mapping.npy")
    found = score_head(head, mapped(Features(features, torch.tensor([0, 1, 0, 1]), ("cat", "dog")), mapping))
    outcome = next(iter(found.outcomes.values()))
    assert outcome.class_names == ("cat", "dog")
    assert_close(outcome.probabilities, logits[:, [4, 1]].softmax(dim=1))


@pytest.mark.parametrize(
    "content, reason",
    [(b"no numpy", "cannot be read"), (np.array([1.5]), r"holds float64 \[1\]"), (np.zeros((2, 2), int), r"\[2, 2\]")],
)
def test_files_that_are_no_class_mapping_are_refused(here, content, reason):
    if isinstance(content, bytes):
        (here / "m.npy").write_bytes(content)
    else:
        np.save(here / "m.npy", content)
    with pytest.raises(DataError, match=reason):
        read_class_mapping("m.npy")


def test_a_set_of_two_hundred_classes_is_answered_among_them_by_identifier(here):
    for number in (8, 6):  # hen and stingray, whose identifiers sort the other way round
        pictures(here / "imagenet-a" / IMAGENET_CLASSES[number].wnid, n=2)
    one = LabelledDataset("ImageNetA:root=imagenet-a", labelled("ImageNetA:root=imagenet-a"))
    head = LinearHead(1, num_classes=1000)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[0], head.bias[8] = 9.0, 1.0  # a tench of everything, but among the two a hen
    labels = torch.as_tensor(one.images.get_targets())
    found = score_head(head, one.with_rules(Features(torch.zeros(4, 2), labels, one.class_names)))
    (outcome,) = found.outcomes.values()
    assert outcome.class_names == ("stingray", "hen") and outcome.probabilities.shape == (4, 2)
    assert found.rows[0].value == 50.0 and found.rows[0].settings["n_answers"] == 2
    assert "answers are chosen among the 2 classes of the validation set, not among all 1000" in found.rows[0].notes


def test_reassessed_labels_are_scored_beside_the_original_ones():
    head = LinearHead(1, num_classes=3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))  # says c of everything
    scoring = Scoring(own_classes=True, label_sets=torch.tensor([[0, 2], [1, -1], [-1, -1]]))
    found = score_head(head, Features(torch.zeros(3, 2), torch.tensor([0, 1, 2]), ("a", "b", "c"), scoring=scoring))
    real = next(row for row in found.rows if row.metric == "real top-1")
    assert (real.value, real.n) == (50.0, 2)  # the third image has no label, the first may be a c
