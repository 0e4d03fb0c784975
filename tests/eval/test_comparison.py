"""Intervals and comparisons against resampling by indices, sums of binomial coefficients and counting by hand."""

import math
from itertools import product

import pytest
import torch

from dinov2.errors import DataError
from dinov2.eval.figures import compare
from dinov2.eval.metrics import bootstrap_interval, holm, mcnemar_p_value
from dinov2.eval.outcome import EvaluationOutcome


def some_hits(n: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def resampled(values: torch.Tensor, n_resamples: int = 20_000) -> torch.Tensor:
    """Means of resamples, image by image."""
    draw = torch.randint(len(values), (n_resamples, len(values)), generator=torch.Generator().manual_seed(7))
    return values.double()[draw].mean(dim=1)


def quantiles(means: torch.Tensor) -> list[float]:
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def records(hit: torch.Tensor, indices: list[int] | None = None):
    """Of a classifier that says 0 of everything, with targets that make these hits."""
    probabilities = torch.tensor([[1.0, 0.0]]).expand(len(hit), 2)
    numbers = torch.tensor(indices if indices is not None else range(len(hit)))
    return EvaluationOutcome(probabilities, (~hit).long(), ("a", "b"), numbers).records()


def test_a_difference_is_that_of_pairs_resampled_together():
    first, second = some_hits(120, 0.7, seed=3), some_hits(120, 0.8, seed=4)
    found = compare(records(first), records(second))
    differences = second.double() - first.double()
    assert found.difference.value == pytest.approx(float(differences.mean()))
    assert [found.difference.low, found.difference.high] == pytest.approx(quantiles(resampled(differences)), abs=0.0085)
    assert found.only_first == sum(a and not b for a, b in zip(first.tolist(), second.tolist(), strict=True))
    assert found.only_second == sum(b and not a for a, b in zip(first.tolist(), second.tolist(), strict=True))


def test_pairing_makes_the_interval_of_nearly_equal_models_narrow():
    first = some_hits(1000, 0.7, seed=5)
    second = first.clone()
    second[:3] = ~second[:3]
    difference = compare(records(first), records(second)).difference
    low, high = bootstrap_interval(first)
    assert difference.high - difference.low < 0.01 < high - low


@pytest.mark.parametrize("a, b", [*product((0, 1, 3, 8), (0, 2, 5, 8)), (30, 12)])
def test_mcnemar_s_test_is_a_sum_of_binomial_coefficients(a, b):
    n = a + b
    tail = sum(math.comb(n, i) for i in range(min(a, b) + 1)) / 2**n
    assert mcnemar_p_value(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_s_test_agrees_with_the_normal_law_where_counts_are_large():
    z = (5100 - 4900 - 1) / math.sqrt(10_000)  # with continuity correction
    assert mcnemar_p_value(4900, 5100) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_holm_multiplies_the_smallest_p_value_by_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_two_models_are_compared_on_the_images_that_both_could_read():
    first = records(torch.tensor([True, False, True]), indices=[0, 4, 9])
    second = records(torch.tensor([False, True, True]), indices=[9, 5, 4])
    found = compare(first, second)
    assert (found.n, found.only_first, found.only_second, found.difference.value) == (2, 1, 1, 0.0)
    with pytest.raises(DataError, match="no image in common"):
        compare(first, records(torch.tensor([True]), indices=[7]))
