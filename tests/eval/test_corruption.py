"""Corruption errors by hand and by definition."""

import pytest
import torch

from dinov2.data.datasets.imagenet_variants import CORRUPTIONS
from dinov2.errors import DataError
from dinov2.eval.metrics import ALEXNET_ERRORS, corruption_error, errors_by_part


def test_the_table_has_the_corruptions_of_the_data_set_in_their_order() -> None:
    assert list(ALEXNET_ERRORS) == list(CORRUPTIONS)


def test_hits_of_all_parts_become_one_error_each() -> None:
    parts = [("fog", 1), ("fog", 2), ("snow", 1), ("snow", 2)]
    part_numbers = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    hits = torch.tensor([True, False, False, True, True, False, False])
    found = errors_by_part(hits, part_numbers, parts)
    assert {name: len(errors) for name, errors in found.items()} == {"fog": 2, "snow": 2}
    assert found["fog"] + found["snow"] == pytest.approx([2 / 3, 0.0, 0.5, 1.0])


def test_a_part_without_images_is_named() -> None:
    with pytest.raises(DataError, match="no image of snow at severity 3 was scored"):
        errors_by_part(torch.tensor([True]), torch.tensor([0]), [("fog", 3), ("snow", 3)])


def test_one_corruption_is_normalised_where_alexnet_s_errors_are_known() -> None:
    assert corruption_error("fog", [0.819324] * 5) == pytest.approx(1)
    errors = [0.1, 0.2, 0.4, 0.5, 0.9]
    assert corruption_error("snow", errors) == pytest.approx(sum(errors) / (5 * ALEXNET_ERRORS["snow"]))
    assert corruption_error("fog", [0.5]) is None and corruption_error("spatter", [0.5] * 5) is None
