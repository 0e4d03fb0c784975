"""Corruption errors by hand and by definition."""

import pytest
import torch

from dinov2.data.datasets.imagenet_variants import CORRUPTIONS
from dinov2.errors import DataError
from dinov2.eval.metrics import ALEXNET_ERRORS, corruption_error, corruption_errors, errors_by_part

ALEXNET = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}


def test_the_table_has_the_corruptions_of_the_data_set_in_their_order() -> None:
    assert list(ALEXNET_ERRORS) == list(CORRUPTIONS)


def test_alexnet_itself_has_one_everywhere() -> None:
    figures = corruption_errors(ALEXNET, clean_error=0.4345)
    assert figures.mce == pytest.approx(1.0)
    assert figures.relative_mce == pytest.approx(1.0)


def test_the_figures_are_the_sums_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = {name: torch.rand(5, generator=generator).double().tolist() for name in ALEXNET_ERRORS}
    clean = 0.2
    ce = {name: sum(errors[name]) / (5 * alexnet) for name, alexnet in ALEXNET_ERRORS.items()}
    relative = [
        sum(error - clean for error in errors[name]) / (5 * (alexnet - 0.4345))
        for name, alexnet in ALEXNET_ERRORS.items()
    ]
    figures = corruption_errors({**errors, "spatter": [0.9] * 5}, clean_error=clean)
    assert figures.mce == pytest.approx(sum(ce.values()) / 15)
    assert figures.relative_mce == pytest.approx(sum(relative) / 15)
    assert figures.mean_error == pytest.approx(sum(map(sum, errors.values())) / 75)  # spatter is not of the fifteen


def test_without_the_clean_error_there_is_no_relative_figure() -> None:
    assert corruption_errors(ALEXNET).relative_mce is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fog": None}, "needs 15 corruptions; 1 lack: fog"),
        ({"fog": [0.1, 0.2]}, r"fog has 2 errors \(0.1, 0.2\)"),
        ({"fog": [10, 20, 30, 40, 50]}, "as fractions"),
    ],
)
def test_a_mean_over_fewer_or_in_per_cent_is_refused(change: dict[str, list[float] | None], message: str) -> None:
    errors = {name: values for name, values in {**ALEXNET, **change}.items() if values is not None}
    with pytest.raises(DataError, match=message):
        corruption_errors(errors)


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
