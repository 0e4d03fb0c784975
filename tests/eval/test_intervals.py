"""Intervals against published examples and scipy."""

import numpy as np
import pytest
import torch

from dinov2.errors import DataError
from dinov2.eval.metrics import bootstrap_interval, bootstrap_statistic, mean_interval

scipy_stats = pytest.importorskip("scipy.stats")


def test_the_bootstrap_interval_of_many_samples_is_wilsons():
    hits = torch.arange(2000) % 4 == 0
    wilson = scipy_stats.binomtest(500, 2000).proportion_ci(method="wilson")
    assert bootstrap_interval(hits, n_resamples=4000) == pytest.approx((wilson.low, wilson.high), abs=2e-3)


def test_bootstrap_of_a_group_resamples_inside_it_only():
    # Within each group all values are equal, so the mean of group means cannot move.
    values_, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])
    assert bootstrap_interval(values_, groups=groups, n_resamples=50) == (0.5, 0.5)
    low, high = bootstrap_interval(values_, n_resamples=500)
    assert low < 0.5 and high > 0.75


def test_the_interval_of_five_repetitions_uses_students_t():
    # mean 3, standard deviation sqrt(2.5), t = 2.7764
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)


def test_student_t_goes_on_smoothly_beyond_its_table():
    widths = [mean_interval([0.0, 1.0] * (n // 2))[1] * 1.0 for n in (20, 22)]
    assert widths[0] > widths[1] > 0.5


@pytest.mark.parametrize("n", [2, 5, 21])
def test_the_interval_of_repetitions_equals_scipy(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)).double().tolist()
    theirs = scipy_stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert mean_interval(values) == pytest.approx(theirs, rel=2e-4)


def continuous(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1)).double().square()


@pytest.mark.parametrize("values", [continuous(101), (continuous(101) > 0.3).double()], ids=["many values", "hits"])
def test_bootstrap_intervals_agree_with_scipy(values: torch.Tensor) -> None:
    theirs = scipy_stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    width = theirs.high - theirs.low
    # The quantiles of 20,000 resamples scatter by about one per cent of the width.
    assert bootstrap_interval(values, n_resamples=20_000) == pytest.approx(tuple(theirs), abs=0.05 * width)


def test_counts_of_few_values_are_distributed_as_samples_drawn_one_by_one() -> None:
    hits = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    # The same values, told apart by less than a quantile sees: more than the few that are drawn as counts.
    apart = torch.cat([hits + 1e-9 * i for i in range(20)])
    as_counts = bootstrap_interval(hits.repeat(20), n_resamples=20_000)
    assert as_counts == pytest.approx(bootstrap_interval(apart, n_resamples=20_000), abs=0.01)


def test_a_stratified_bootstrap_has_the_variance_of_the_mean_of_class_means() -> None:
    # Classes of 40, 10 and 5 images with recalls 0.5, 0.4 and 0.6.
    groups = torch.tensor([0] * 40 + [1] * 10 + [2] * 5)
    hits = torch.tensor([1.0] * 20 + [0.0] * 20 + [1.0] * 4 + [0.0] * 6 + [1.0] * 3 + [0.0] * 2)
    deviation = (sum(p * (1 - p) / n for p, n in ((0.5, 40), (0.4, 10), (0.6, 5))) ** 0.5) / 3
    low, high = bootstrap_interval(hits, groups=groups, n_resamples=20_000)
    assert (high - low) == pytest.approx(2 * 1.96 * deviation, rel=0.05)
    assert (high + low) / 2 == pytest.approx(0.5, abs=0.02)


def test_a_figure_that_is_a_mean_has_the_same_interval_by_either_way() -> None:
    values = continuous(60)
    either = bootstrap_statistic(lambda rows: values[rows].mean().item(), 60, n_resamples=4000)
    assert either == pytest.approx(bootstrap_interval(values), abs=0.02)
    groups = torch.arange(60) % 3
    within = bootstrap_statistic(lambda rows: len(groups[rows].unique()), 60, n_resamples=20, groups=groups)
    assert within == (3.0, 3.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = continuous(40)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_no_sample_has_no_interval() -> None:
    for interval in (
        lambda: bootstrap_interval(torch.empty(0)),
        lambda: bootstrap_statistic(lambda rows: 0.0, 0),
    ):
        with pytest.raises(DataError, match="at least one sample, got none"):
            interval()
    with pytest.raises(DataError, match="at least two of them, got 1"):
        mean_interval([1.0])
