import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from dinov2.analysis import patch_maps
from dinov2.analysis.patch_maps import (
    high_norm_share,
    high_norm_threshold,
    mutual_nearest,
    patch_at,
    patch_norms,
    similarity_map,
)
from dinov2.errors import ConfigError, DataError


def features(height, width, dim=8, seed=0):
    return torch.randn(height, width, dim, generator=torch.Generator().manual_seed(seed))


def test_similarity_is_the_cosine_and_a_patch_is_like_itself():
    patches = features(3, 5)
    found = similarity_map(patches, patches[1, 4])
    assert_close(found, cosine_similarity(patches, patches[1, 4].expand_as(patches), dim=-1))
    assert found.argmax() == 1 * 5 + 4 and found.max() == pytest.approx(1.0, abs=1e-6)


def test_half_precision_features_are_compared_in_float32():
    patches = features(3, 5)
    halves = similarity_map(patches.half(), patches[0, 0].half())
    assert_close(halves, similarity_map(patches, patches[0, 0]), atol=2e-3, rtol=0)


def test_patches_of_zeros_are_similar_to_nothing():
    assert similarity_map(torch.zeros(2, 2, 4), torch.ones(4)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    "x, y, cell", [(0, 0, (0, 0)), (99, 0, (0, 4)), (99.9, 59.9, (2, 4)), (20, 19.99, (0, 1)), (19.99, 20, (1, 0))]
)
def test_a_point_lies_in_the_patch_that_covers_it(x, y, cell):
    assert patch_at(x, y, size=(60, 100), grid=(3, 5)) == cell


@pytest.mark.parametrize("x, y", [(100, 0), (0, 60), (-1, 0), (0, -0.1)])
def test_a_point_outside_is_refused_with_the_size_of_the_image(x, y):
    with pytest.raises(ConfigError, match="100 pixels wide and 60 high; choose x from 0 to 99 and y from 0 to 59"):
        patch_at(x, y, size=(60, 100), grid=(3, 5))


def test_norms_are_lengths():
    assert patch_norms(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist() == [[5.0, 0.0]]


def test_patches_above_twice_the_median_are_of_high_norm():
    norms = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 50.0]])
    threshold = high_norm_threshold(norms)
    assert threshold == 2.0
    assert high_norm_share(norms, threshold) == pytest.approx(1 / 6)


def test_a_threshold_of_no_patches_is_refused():
    with pytest.raises(DataError, match="no patches"):
        high_norm_threshold(torch.empty(0))


def by_hand(first, second):
    """Pairs of a loop over all patches of both."""
    flat, other = first.flatten(0, 1), second.flatten(0, 1)
    there = [max(range(len(other)), key=lambda j: float(cosine_similarity(a, other[j], dim=0))) for a in flat]
    back = [max(range(len(flat)), key=lambda i: float(cosine_similarity(b, flat[i], dim=0))) for b in other]
    return {(i, j) for i, j in enumerate(there) if back[j] == i}


@pytest.mark.parametrize("rows", [2048, 5])
def test_matches_are_pairs_that_are_each_others_nearest(monkeypatch, rows):
    monkeypatch.setattr(patch_maps, "_ROWS", rows)
    first, second = features(4, 5), features(3, 6, seed=1)
    matches = mutual_nearest(first, second)
    pairs = {(int(a[0] * 5 + a[1]), int(b[0] * 6 + b[1])) for a, b in zip(matches.first, matches.second, strict=True)}
    assert pairs == by_hand(first, second) and len(pairs) > 2
    assert bool((matches.similarity.diff() <= 0).all())
    a, b = matches.first[0], matches.second[0]
    assert matches.similarity[0] == pytest.approx(float(cosine_similarity(first[*a], second[*b], dim=0)), abs=1e-6)


def test_a_shifted_image_matches_patch_by_patch():
    wide = features(4, 8, dim=32)
    matches = mutual_nearest(wide[:, :6], wide[:, 2:])
    shifted = matches.similarity > 0.999
    assert int(shifted.sum()) == 4 * 4
    assert bool((matches.first[shifted] - matches.second[shifted] == torch.tensor([0, 2])).all())


def test_features_of_different_models_are_not_compared():
    with pytest.raises(DataError, match="features of 8 and 4 numbers"):
        mutual_nearest(features(2, 2), features(2, 2, dim=4))
    with pytest.raises(DataError, match="features of 8 and 4 numbers"):
        similarity_map(features(2, 2), torch.ones(4))
