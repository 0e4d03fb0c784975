"""Positional arguments that versions of transformers read differently; `row n` counts the known defects."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.model_cases import CLASSES, FAMILIES, difference, images, our_model

pytestmark = pytest.mark.parametrize("family", FAMILIES)

# Of `our_model` and `images`: 2 layers of 4 heads, 2 images of 35 patches.
HEADS = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.5, 1.0]])
PATCHES = torch.arange(70).view(2, 35) % 3 == 0
CLASS_NUMBERS = torch.tensor([1, 4])


def attended(family: str) -> Tensor:
    tokens = torch.ones(2, 39 if family == "Dinov2WithRegisters" else 36, dtype=torch.long)
    tokens[:, 20:] = 0
    return tokens


def same(model: Any, values: tuple[Any, ...], named: dict[str, Any]) -> None:
    found, expected = model(images(), *values), model(images(), **named)
    assert type(found) is type(expected)
    assert difference(_values(found), _values(expected)) == 0
    without = model(images())
    assert type(found) is not type(without) or difference(_values(found), _values(without)) > 0


# Rows 14 and 16: the slots of 4.37, 4.56, 5.2 and 5.23.
@pytest.mark.parametrize(
    "values, named",
    [
        ((PATCHES,), {"bool_masked_pos": PATCHES}),
        ((None, HEADS), {"head_mask": HEADS}),
        ((None, HEADS[0]), {"head_mask": HEADS[0]}),
        ((PATCHES, HEADS), {"bool_masked_pos": PATCHES, "head_mask": HEADS}),
        ((None, True), {"output_hidden_states": True}),
        ((None, [0, -1]), {"output_hidden_states": [0, -1]}),
        ((None, None, None, True), {"output_hidden_states": True}),
        ((None, HEADS, True, True), {"head_mask": HEADS, "output_attentions": True, "output_hidden_states": True}),
        ((None, HEADS, False, True, False), {"head_mask": HEADS, "output_hidden_states": True, "return_dict": False}),
        ((None, None, True, False), {"output_attentions": True}),
        ((None, None, False, False, False), {"return_dict": False}),
    ],
)
def test_a_model_reads_the_positions_of_every_version(
    family: str, values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    same(our_model(family, "Model"), values, named)


# Row 14: the slot of 5.23.
def test_a_model_takes_an_attention_mask_where_the_newest_version_has_it(family: str) -> None:
    same(our_model(family, "Model"), (None, attended(family)), {"attention_mask": attended(family)})
    same(our_model(family, "Model"), (None, attended(family).float()), {"attention_mask": attended(family)})


# Row 15.
@pytest.mark.parametrize(
    "values, named",
    [
        ((CLASS_NUMBERS,), {"labels": CLASS_NUMBERS}),
        ((CLASS_NUMBERS[:, None],), {"labels": CLASS_NUMBERS}),
        ((torch.eye(5)[:2],), {"labels": torch.eye(5)[:2]}),
        ((HEADS,), {"head_mask": HEADS}),
        ((HEADS[1],), {"head_mask": HEADS[1]}),
        ((HEADS, CLASS_NUMBERS), {"head_mask": HEADS, "labels": CLASS_NUMBERS}),
        ((None, CLASS_NUMBERS), {"labels": CLASS_NUMBERS}),
        ((None, CLASS_NUMBERS, True, False), {"labels": CLASS_NUMBERS, "output_attentions": True}),
        ((None, None, False, True, False), {"output_hidden_states": True, "return_dict": False}),
    ],
)
def test_a_classifier_reads_the_positions_of_every_version(
    family: str, values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    same(our_model(family, "ForImageClassification"), values, named)


def test_a_classifier_takes_an_attention_mask_where_the_newest_version_has_it(family: str) -> None:
    named = {"labels": CLASS_NUMBERS, "attention_mask": attended(family)}
    same(our_model(family, "ForImageClassification"), tuple(named.values()), named)


@pytest.mark.parametrize(
    "values, named",
    [
        ((True,), {"output_hidden_states": True}),
        ((True, True), {"output_hidden_states": True, "output_attentions": True}),
        ((False, True, False), {"output_attentions": True, "return_dict": False}),
    ],
)
def test_a_backbone_reads_the_positions_of_every_version(
    family: str, values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    same(our_model(family, "Backbone"), values, named)
    same(our_model(family, "Backbone"), (attended(family),), {"attention_mask": attended(family)})


def test_class_numbers_are_no_head_mask_though_there_are_as_many_images_as_heads(family: str) -> None:
    model, x = our_model(family, "ForImageClassification"), images(4)
    labels = torch.tensor([0, 1, 4, 2])
    assert difference(model(x, labels).loss, model(x, labels=labels).loss) == 0
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])  # five classes: these are no targets for them
    assert difference(model(x, mask).logits, model(x, head_mask=mask).logits) == 0


def test_what_fits_two_readings_is_refused_with_both(family: str) -> None:
    regression = our_model(family, "ForImageClassification", num_labels=1)
    with pytest.raises(TypeError, match=r"\[4\] by position .* as labels or head_mask; pass it by keyword"):
        regression(images(4), torch.ones(4))
    registers = family == "Dinov2WithRegisters"
    model = our_model(family, "Model", num_attention_heads=8)
    x = images(2, 16, 16) if registers else images(2, 8, 56)  # 8 tokens: as many as heads
    with pytest.raises(TypeError, match=r"\[2, 8\] by position .* as attention_mask or head_mask; pass it by keyword"):
        model(x, None, torch.ones(2, 8))


@pytest.mark.parametrize("kind", CLASSES)
def test_what_fits_no_reading_is_refused_with_the_known_ones(family: str, kind: str) -> None:
    model = our_model(family, kind)
    values = (None, torch.ones(3, 3)) if kind == "Model" else (torch.ones(3, 3),)
    with pytest.raises(TypeError, match=r"shape \[3, 3\] by position .* fits the signature of no version"):
        model(images(), *values)
    with pytest.raises(TypeError, match="fits the signature of no version"):
        model(images(), *[None] * 6)


def test_the_same_argument_by_position_and_by_keyword_is_refused(family: str) -> None:
    with pytest.raises(TypeError, match="head_mask by position and by keyword; give it once"):
        our_model(family, "Model")(images(), None, HEADS, head_mask=HEADS)


def _values(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else output.to_tuple()
