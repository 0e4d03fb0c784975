"""Labels and losses that some version of the stock classes gets wrong; `row n` counts the known defects."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dinov2.hf as hf
from dinov2.hf.models import _warn_about_fresh_head
from tests.hf.model_cases import FAMILIES, difference, images, our_model

pytestmark = pytest.mark.parametrize("family", FAMILIES)

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def classifier(family: str, **changes: Any) -> Any:
    return our_model(family, "ForImageClassification", **changes)


# Row 35.
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_class_numbers_may_have_any_integer_type(family: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    output = classifier(family)(images(), labels=torch.tensor([1, 4], dtype=dtype).view(shape))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([1, 4])))


def test_class_numbers_of_minus_a_hundred_are_left_out(family: str) -> None:
    output = classifier(family)(images(), labels=torch.tensor([-100, 4], dtype=torch.int32))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[1:], torch.tensor([4])))


# Row 36.
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float32, torch.float64])
def test_several_classes_an_image_may_be_given_in_any_type(family: str, dtype: torch.dtype) -> None:
    model = classifier(family, problem_type="multi_label_classification")
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1]])
    output = model(images(), labels=labels.to(dtype))
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels.float()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_targets_of_a_regression_may_be_given_in_any_type(family: str, dtype: torch.dtype) -> None:
    output = classifier(family, num_labels=1)(images(), labels=torch.tensor([1, 4], dtype=dtype))
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], torch.tensor([1.0, 4.0])))


# Row 37.
def test_one_model_takes_labels_of_one_kind_after_the_other(family: str) -> None:
    model = classifier(family)
    first = model(images(), labels=torch.tensor([1, 4]))
    second = model(images(), labels=torch.eye(5)[:2])
    torch.testing.assert_close(first.loss, F.cross_entropy(first.logits, torch.tensor([1, 4])))
    torch.testing.assert_close(second.loss, F.binary_cross_entropy_with_logits(second.logits, torch.eye(5)[:2]))
    assert model.config.problem_type is None


# Row 37.
def test_a_problem_type_set_later_is_checked_when_it_is_needed(family: str) -> None:
    model = classifier(family)
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match="problem_type is 'ranking'; choose regression, single_label"):
        model(images(), labels=torch.tensor([1, 4]))


# Row 61: the mean over all batches is the same, however they are cut.
@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_losses_of_accumulated_batches_add_up_to_that_of_the_whole(family: str, problem: str) -> None:
    model = classifier(family, problem_type=problem)
    x = images(6)
    labels = torch.arange(6) % 5 if problem.startswith("single") else torch.linspace(0, 1, 30).view(6, 5)
    whole = model(x, labels=labels).loss
    n_items = torch.tensor(labels.numel())
    parts = [
        model(x[rows], labels=labels[rows], num_items_in_batch=n_items).loss for rows in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_labels_that_do_not_fit_are_refused_in_a_sentence(family: str) -> None:
    model = classifier(family)
    for labels in (torch.tensor([1, 2, 3]), torch.eye(5)[:1], torch.zeros(2, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"labels of shape .* do not fit"):
            model(images(), labels=labels)


def test_a_classifier_without_labels_gives_the_features(family: str) -> None:
    model = classifier(family, num_labels=0)
    output = model.base_model(images()).last_hidden_state
    patches = output[:, 1 + model.base_model.embeddings.num_register_tokens :].mean(dim=1)
    assert difference(model(images()).logits, torch.cat([output[:, 0], patches], dim=1)) == 0


# Row 65: example ids that never had a classifier.
def test_a_checkpoint_without_a_classifier_is_named_with_one_that_has(family: str, tmp_path: Path) -> None:
    our_model(family, "Model").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds a backbone and no classifier.*dinov2-\.\.\.-imagenet1k-1-layer"):
        getattr(hf, family + "ForImageClassification").from_pretrained(tmp_path)


# Row 65.
def test_a_released_repository_without_a_classifier_is_answered_with_its_sibling(family: str) -> None:
    name = "facebook/dinov2-with-registers-base" if family == "Dinov2WithRegisters" else "facebook/dinov2-base"
    with pytest.warns(UserWarning, match=f"^{name} holds a backbone .*; {name}-imagenet1k-1-layer has one"):
        _warn_about_fresh_head(name, ["classifier.weight", "classifier.bias"])
