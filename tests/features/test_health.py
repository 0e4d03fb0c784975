import math

import pytest
import torch

from dinov2.errors import DataError
from dinov2.features.health import feature_health, participation_ratio, rank_me, uniformity

WHITE = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))


def test_white_features_use_all_directions():
    assert rank_me(WHITE) == pytest.approx(16, rel=0.01)
    assert participation_ratio(WHITE) == pytest.approx(16, rel=0.02)


def test_rank_me_of_known_singular_values():
    # Shares 3/4 and 1/4: exp of their entropy.
    features = torch.diag(torch.tensor([3.0, 1.0]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rank_me(features) == pytest.approx(expected, rel=1e-5)


def test_participation_ratio_of_known_variances():
    features = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]])  # variances 2 and 1/2
    assert participation_ratio(features) == pytest.approx(2.5**2 / 4.25)


def test_collapsed_features_have_rank_one_no_spread_and_no_uniformity():
    collapsed = torch.full((50, 16), 0.3)
    assert rank_me(collapsed) == pytest.approx(1.0, abs=1e-3)
    assert participation_ratio(collapsed) == 0.0
    assert uniformity(collapsed) == pytest.approx(0.0, abs=1e-6)


def test_uniformity_of_two_opposite_points():
    assert uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8.0)


def test_even_features_are_more_uniform_than_a_bundle():
    assert uniformity(WHITE) < uniformity(WHITE + 3)


def test_all_measures_have_names():
    assert set(feature_health(WHITE)) == {"rank_me", "participation_ratio", "uniformity"}


@pytest.mark.parametrize("measure", [rank_me, participation_ratio, uniformity])
def test_features_that_are_not_finite_are_refused(measure):
    with pytest.raises(DataError, match="diverged"):
        measure(torch.full((3, 2), torch.nan))
