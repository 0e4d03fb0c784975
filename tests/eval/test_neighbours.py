import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from dinov2.errors import DataError
from dinov2.eval import neighbours
from dinov2.eval.neighbours import merge_neighbours, nearest_neighbours, soft_vote


def brute_force(queries, train, k):
    """Sorted by similarity, then by index, in Python."""
    similarities = (queries.double() @ train.double().T).tolist()
    order = [sorted(range(len(train)), key=lambda i, row=row: (-row[i], i))[:k] for row in similarities]
    return torch.tensor(order)


def integer_features(n, seed):
    """Products of small integers are exact, so equal similarities are truly equal."""
    return torch.randint(-2, 3, (n, 4), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("query_block", "train_block"), [(7, 11), (1, 1), (64, 5), (1000, 1000)])
@pytest.mark.parametrize("k", [1, 4, 5, 12, 90])
def test_neighbours_equal_brute_force_with_many_ties_whatever_the_blocks(k, query_block, train_block):
    queries, train = integer_features(23, 0), integer_features(90, 1)
    similarities, indices = nearest_neighbours(queries, train, k=k, query_block=query_block, train_block=train_block)
    assert torch.equal(indices, brute_force(queries, train, k))
    assert torch.equal(similarities, (queries @ train.T).gather(1, indices))


def test_of_identical_rows_the_first_ones_win():
    _, indices = nearest_neighbours(torch.ones(2, 3), torch.ones(40, 3), k=5, train_block=16)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_cosine_ignores_lengths():
    train = torch.tensor([[10.0, 0.0], [0.1, 0.1], [0.0, 3.0]])
    similarities, indices = nearest_neighbours(torch.tensor([[2.0, 2.0]]), train, k=1, cosine=True)
    assert indices.item() == 1
    assert_close(similarities, torch.ones(1, 1))
    assert nearest_neighbours(torch.tensor([[2.0, 2.0]]), train, k=1)[1].item() == 0


@pytest.mark.parametrize("train_block", [3, 10, 100])
def test_an_excluded_row_is_never_a_neighbour(train_block):
    features = integer_features(10, 3)
    _, indices = nearest_neighbours(features, features, k=9, exclude=torch.arange(10), train_block=train_block)
    assert [sorted(row) for row in indices.tolist()] == [[j for j in range(10) if j != i] for i in range(10)]


def test_the_search_is_in_float32_inside_autocast():
    # Two similarities 1e-4 apart are one number in bfloat16.
    train = torch.tensor([[0.7000, 0.0], [0.7001, 0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarities, indices = nearest_neighbours(torch.tensor([[1.0, 0.0]]), train, k=2)
    assert indices.tolist() == [[1, 0]]
    assert similarities.dtype == torch.float32


def test_the_search_is_in_float32_whatever_products_the_training_uses_and_leaves_that_setting_alone(monkeypatch):
    # Few machines round float32 products of this size, so the setting itself is looked at while the search runs.
    seen = []
    search_block = neighbours._search_block

    def noted(*args):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return search_block(*args)

    monkeypatch.setattr(neighbours, "_search_block", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        nearest_neighbours(torch.randn(8, 64), torch.randn(50, 64), k=3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"]


@pytest.mark.parametrize(
    ("queries", "train", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 5, "5 neighbours were asked for, but there are 4"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "0 neighbours"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, "same width"),
        (torch.full((2, 3), torch.nan), torch.ones(4, 3), 1, "diverged"),
        (torch.ones(2, 3), torch.full((4, 3), torch.inf), 1, "diverged"),
    ],
)
def test_searches_that_cannot_be_right_are_refused(queries, train, k, message):
    with pytest.raises(DataError, match=message):
        nearest_neighbours(queries, train, k=k)


def test_no_queries_have_no_neighbours():
    similarities, indices = nearest_neighbours(torch.empty(0, 3), torch.ones(4, 3), k=2)
    assert similarities.shape == indices.shape == (0, 2)


def test_merging_prefers_the_lower_index_among_equals():
    similarities, indices = merge_neighbours(torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([[7, 8, 2]]), k=2)
    assert indices.tolist() == [[8, 2]]
    assert similarities[0].tolist() == pytest.approx([0.9, 0.5])


def test_the_vote_of_every_k_equals_its_definition():
    similarities = normalize(torch.rand(6, 20, generator=torch.Generator().manual_seed(0)), dim=1).sort(
        dim=1, descending=True
    )[0]
    labels = torch.arange(120).view(6, 20) * 7 % 5
    votes = soft_vote(similarities, labels, n_classes=5, ks=[20, 3], temperature=0.07)
    weights = (similarities.double() / 0.07).softmax(dim=1)
    for k in (3, 20):
        expected = torch.stack([(weights * (labels == c))[:, :k].sum(dim=1) for c in range(5)], dim=1)
        assert_close(votes[k].double(), expected, atol=1e-6, rtol=0)
    assert_close(votes[20].sum(dim=1), torch.ones(6))
