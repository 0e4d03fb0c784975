"""Near-duplicates: the pairs that all products give, without all products at once."""

import pytest
import torch
from torch.nn.functional import normalize

from dinov2.errors import DataError
from dinov2.eval.duplicates import groups_of_pairs, similar_pairs


def features(n: int = 60) -> torch.Tensor:
    rows = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    rows[[7, 40]] = rows[3] * torch.tensor([[2.0], [0.5]])  # the same direction
    return rows


@pytest.mark.parametrize("block", [1, 7, 60, 4096])
def test_pairs_are_those_of_the_whole_matrix_whatever_the_blocks(block):
    unit = normalize(features(), dim=1)
    products = unit @ unit.T
    expected = {(i, j) for i in range(60) for j in range(i + 1, 60) if products[i, j] >= 0.97}
    pairs, similarities = similar_pairs(features(), threshold=0.97, block=block)
    assert {tuple(pair) for pair in pairs.tolist()} == expected and len(pairs) == len(expected) > 10
    torch.testing.assert_close(similarities, products[pairs[:, 0], pairs[:, 1]])
    assert bool((similarities.diff() <= 0).all())
    assert {(3, 7), (3, 40), (7, 40)} <= {tuple(pair) for pair in pairs[:3].tolist()}


def test_no_block_is_larger_than_asked_for(monkeypatch):
    sizes = []
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append((a.shape[0], b.shape[1])) or real(a, b))
    done = []
    similar_pairs(features(), threshold=0.999, block=16, progress=lambda rows, total: done.append((rows, total)))
    assert max(max(size) for size in sizes) == 16 and len(sizes) == 4 + 3 + 2 + 1
    assert done == [(16, 60), (32, 60), (48, 60), (60, 60)]


def test_a_threshold_that_everything_passes_is_refused_before_memory_is_full():
    with pytest.raises(DataError, match="more than 50 pairs of images are at least -0.5 similar; give a higher"):
        similar_pairs(features(), threshold=-0.5, most=50, block=8)


def test_features_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="NaN or infinite"):
        similar_pairs(torch.tensor([[1.0, float("nan")]]), threshold=0.9)


def test_nothing_similar_is_no_pair():
    pairs, similarities = similar_pairs(torch.eye(4), threshold=0.5)
    assert pairs.shape == (0, 2) and similarities.shape == (0,)
    assert groups_of_pairs(pairs) == []


def test_groups_are_what_hangs_together_the_largest_first():
    pairs = torch.tensor([[8, 9], [2, 5], [5, 7], [1, 7], [3, 4], [4, 3]])
    assert groups_of_pairs(pairs) == [[1, 2, 5, 7], [3, 4], [8, 9]]
