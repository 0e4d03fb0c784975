import math

import numpy as np
import pytest
import torch

from dinov2.analysis.health import (
    assignment_health,
    effective_rank,
    feature_health,
    nearest_distances,
    participation_ratio,
    patch_health,
    rank_me,
    spread,
    uniformity,
)
from dinov2.errors import DataError
from dinov2.loss.koleo import koleo_loss

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


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=["tall", "wide"])
def test_rank_me_is_the_entropy_of_numpys_singular_values(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    singular = np.zeros(shape[1])
    singular[: min(shape)] = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert rank_me(features) == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-6)


def test_a_common_offset_hides_from_rank_me_but_not_from_the_effective_rank():
    assert rank_me(WHITE + 100) < 2
    assert effective_rank(WHITE + 100) == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("rows", [torch.full((50, 16), 0.3), torch.full((50, 16), 0.3) * (1 + 1e-8)])
def test_identical_rows_have_an_effective_rank_of_one(rows):
    assert effective_rank(rows) == 1.0


def test_spread_is_one_around_the_sphere_and_nothing_at_one_point():
    corners = torch.cat([torch.eye(8), -torch.eye(8)]) * 7
    assert spread(corners) == pytest.approx(1)
    assert spread(torch.ones(5, 8)) == pytest.approx(0, abs=1e-6)


def test_nearest_distances_of_points_on_a_circle():
    angles = torch.tensor([0.0, 0.1, 0.4])
    points = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5.0], [2.0]])
    expected = [2 * math.sin(0.05), 2 * math.sin(0.05), 2 * math.sin(0.15)]
    assert nearest_distances(points).tolist() == pytest.approx(expected, rel=1e-5)


def test_nearest_distances_are_what_koleo_takes_the_logarithm_of():
    features = WHITE[:64]
    assert -nearest_distances(features).log().mean().item() == pytest.approx(koleo_loss(features).item(), abs=1e-5)


def test_duplicates_have_no_distance_and_one_row_has_no_neighbour():
    assert nearest_distances(torch.ones(2, 4)).tolist() == [0, 0]
    with pytest.raises(DataError, match="two rows"):
        nearest_distances(torch.ones(1, 4))


def test_a_teacher_that_is_sure_of_nothing_says_the_same_of_all():
    health = assignment_health(torch.full((6, 8), 1 / 8))
    assert health["teacher_entropy"] == pytest.approx(math.log(8)) == health["marginal_entropy"]
    assert health["kl_to_uniform"] == pytest.approx(0, abs=1e-12)


def test_a_constant_teacher_is_sure_and_uses_one_prototype():
    rows = torch.zeros(6, 8)
    rows[:, 3] = 1
    health = assignment_health(rows)
    assert health["teacher_entropy"] == 0 == health["marginal_entropy"]
    assert health["kl_to_uniform"] == pytest.approx(math.log(8))
    assert health["prototype_usage"] == pytest.approx(1 / 6)


def test_a_teacher_that_tells_every_crop_apart_is_sure_and_uses_all_prototypes():
    health = assignment_health(torch.eye(8))
    assert health["teacher_entropy"] == 0
    assert health["marginal_entropy"] == pytest.approx(math.log(8))
    assert health["prototype_usage"] == 1


def test_the_divergence_from_uniform_is_torchs():
    rows = torch.rand(20, 8).softmax(dim=1)
    uniform = torch.full((8,), 1 / 8)
    expected = torch.nn.functional.kl_div(uniform.log(), rows.mean(dim=0), reduction="sum").item()
    assert assignment_health(rows)["kl_to_uniform"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows", [torch.zeros(0, 8), torch.zeros(8)])
def test_assignments_of_another_shape_are_refused(rows):
    with pytest.raises(DataError, match=r"\[S, K\]"):
        assignment_health(rows)


def test_assignments_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="diverged"):
        assignment_health(torch.full((2, 2), torch.nan))


def test_patches_that_turn_with_their_place_are_alike_when_near():
    # The direction turns by 10 degrees a column and by 10 a row.
    angle = (torch.arange(8.0)[:, None] + torch.arange(8.0)[None]) * math.radians(10)
    patches = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    health = patch_health(patches, patches)
    assert health["near_similarity"] == pytest.approx(math.cos(math.radians(10)), rel=1e-5)
    assert health["far_similarity"] == pytest.approx(math.cos(math.radians(40)), rel=1e-5)
    assert health["similarity_decay"] == pytest.approx(health["near_similarity"] - health["far_similarity"])


def test_equal_patches_do_not_decay_and_norms_are_those_before_the_norm():
    patches = torch.ones(2, 3, 5, 4)
    before = patches.clone()
    before[0, 1, 2] *= 10
    health = patch_health(patches, before)
    assert health["similarity_decay"] == pytest.approx(0, abs=1e-6)
    assert health["high_norm_share"] == pytest.approx(1 / 30)


def test_a_grid_of_one_patch_says_nothing_and_two_shapes_are_refused():
    assert patch_health(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4)) == {}
    with pytest.raises(DataError, match="one shape"):
        patch_health(torch.ones(2, 2, 2, 4), torch.ones(2, 2, 1, 4))


@pytest.mark.parametrize("measure", [rank_me, effective_rank, participation_ratio, uniformity, spread])
def test_features_that_are_not_finite_are_refused(measure):
    with pytest.raises(DataError, match="diverged"):
        measure(torch.full((3, 2), torch.nan))
