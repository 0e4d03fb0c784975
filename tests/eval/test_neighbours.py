import sys

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from dinov2.errors import ConfigError, DataError, MissingDependency
from dinov2.eval.knn import search
from dinov2.eval.knn.evaluate import soft_vote
from dinov2.eval.knn.search import PRODUCTS, QuantisedProduct, merge_neighbours, nearest_neighbours


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

    class Noted(QuantisedProduct):
        def __call__(self, queries, train, out):
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return queries @ train.T

    monkeypatch.setitem(PRODUCTS, "float32", Noted(torch.float32, queries_at_once=8))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        nearest_neighbours(torch.randn(8, 64), torch.randn(50, 64), k=3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"]


# Every product gives what float64 gives


def exact(queries, train, k):
    """Neighbours by similarities that are summed in float64 and rounded once, equal ones by row."""
    similarities = (queries.double() @ train.double().T).float()
    indices = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarities.gather(1, indices), indices


def features(kind, n, seed):
    """Features that make it hard: many directions, one cluster, near copies, an overwhelming column, wild lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 48, generator=generator)
    match kind:
        case "cluster":
            rows = normalize(torch.ones(48) + 0.01 * rows, dim=1)
        case "copies":
            centres = torch.randn(5, 48, generator=torch.Generator().manual_seed(99))
            rows = centres[torch.randint(0, 5, (n,), generator=generator)] + 1e-6 * rows
        case "column":
            rows[:, 7] *= 300
        case "zeros":
            rows[::2] = 0
        case "lengths":
            rows *= 10 ** torch.linspace(-4, 4, n).unsqueeze(1)
    return rows


@pytest.mark.parametrize("kind", ["directions", "cluster", "copies", "column", "zeros", "lengths"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_product_finds_exactly_the_nearest_rows(product, kind):
    queries, train = features(kind, 30, 0), features(kind, 700, 1)
    similarities, indices = nearest_neighbours(queries, train, k=9, product=product, query_block=16, train_block=150)
    expected_similarities, expected = exact(queries, train, 9)
    assert torch.equal(indices, expected)
    assert torch.equal(similarities, expected_similarities)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_never_further_off_than_their_bound(name):
    product = PRODUCTS[name]
    queries, train = features("lengths", 64, 2), features("column", 128, 3)
    rounded_queries, rounded_train = product.quantise(queries), product.quantise(train)
    scores = product(rounded_queries.values, rounded_train.values, torch.empty(64, 128)).float()
    truth = queries.double() @ train.double().T
    length, error = (part.view(-1, 64).amax(dim=1) for part in (rounded_train.length, rounded_train.error))
    for column in range(128):
        # With the true similarity as the bound, the score must reach the threshold: else a neighbour would be lost.
        bound = torch.nextafter(truth[:, column].float(), torch.tensor(-torch.inf))
        threshold = product.threshold(bound, rounded_queries, length, error)
        assert bool((scores[:, column] >= threshold[:, column // 64]).all())
    assert (scores - truth).abs().max() > 0 or name == "float32"


def test_rounding_that_hides_too_much_is_not_chosen(monkeypatch):
    used = []
    monkeypatch.setattr(search, "_SMALLEST_BFLOAT16_SEARCH", 1)
    monkeypatch.setattr(search, "choose_precision", lambda name, device: torch.bfloat16)

    class Noted(QuantisedProduct):
        def __call__(self, queries, train, out):
            used.append(self.dtype)
            return super().__call__(queries, train, out)

    for name, product in PRODUCTS.items():
        monkeypatch.setitem(PRODUCTS, name, Noted(product.dtype, product.queries_at_once))
    for kind, expected in (("directions", torch.bfloat16), ("cluster", torch.float32)):
        nearest_neighbours(features(kind, 20, 0), features(kind, 30_000, 1), k=1)
        assert used[-1] == expected


def test_rows_sorted_by_class_are_found_as_well():
    train = torch.cat([features("copies", 300, 5).sort(dim=0)[0], features("directions", 300, 6)])
    queries = train[::29] + 1e-3
    _, indices = nearest_neighbours(queries, train, k=20, train_block=64)
    assert torch.equal(indices, exact(queries, train, 20)[1])


def test_a_thousand_equal_rows_are_settled_by_their_numbers():
    train = torch.cat([torch.ones(1000, 8), torch.full((1, 8), 2.0), torch.ones(1000, 8)])
    _, indices = nearest_neighbours(torch.ones(3, 8), train, k=4, train_block=256)
    assert indices.tolist() == [[1000, 0, 1, 2]] * 3


def test_half_precision_rows_and_queries_without_an_excluded_row_are_taken():
    queries, train = integer_features(5, 0), integer_features(40, 1)
    exclude = torch.tensor([3, -1, 0, -1, 39])
    _, indices = nearest_neighbours(queries, train.half(), k=6, exclude=exclude)
    expected = brute_force(queries, train, 7)
    for row, left_out, wanted in zip(indices.tolist(), exclude.tolist(), expected.tolist(), strict=True):
        assert row == [i for i in wanted if i != left_out][:6]


def test_parts_of_the_queries_are_searched_one_after_the_other(monkeypatch):
    monkeypatch.setattr(search, "_PAIRS_A_PASS", 20)
    queries, train = integer_features(23, 0), integer_features(90, 1)
    _, indices = nearest_neighbours(queries, train, k=4, query_block=7, exclude=torch.full((23,), -1))
    assert torch.equal(indices, brute_force(queries, train, 4))


# FAISS


def test_the_flat_index_of_faiss_finds_the_same():
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    queries, train = features("directions", 20, 0), features("directions", 500, 1)
    exclude = torch.arange(20)
    for cosine in (False, True):
        ours = nearest_neighbours(queries, train, k=7, cosine=cosine, exclude=exclude)
        theirs = nearest_neighbours(queries, train, k=7, cosine=cosine, exclude=exclude, backend="faiss")
        assert torch.equal(ours[1], theirs[1])
        assert_close(ours[0], theirs[0])


def test_clusters_of_faiss_find_most_and_always_k():
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    queries, train = features("copies", 40, 0), features("copies", 4000, 1)
    train = train + 0.1 * features("directions", 4000, 2)
    _, ours = nearest_neighbours(queries, train, k=5, cosine=True)
    _, theirs = nearest_neighbours(queries, train, k=5, cosine=True, backend="faiss-ivf")
    shared = (ours.unsqueeze(2) == theirs.unsqueeze(1)).any(dim=2).float().mean()
    assert shared > 0.5
    _, many = nearest_neighbours(queries, train, k=3000, backend="faiss-ivf")
    assert all(len(set(row)) == 3000 and min(row) >= 0 for row in many.tolist())


def test_without_faiss_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match="pip install 'faiss-cpu'"):
        nearest_neighbours(torch.ones(2, 3), torch.ones(4, 3), k=1, backend="faiss")


@pytest.mark.parametrize(
    ("options", "message"), [({"product": "float8"}, "auto, float32, bfloat16"), ({"backend": "annoy"}, "faiss-ivf")]
)
def test_unknown_products_and_backends_are_refused_with_those_there_are(options, message):
    with pytest.raises(ConfigError, match=message):
        nearest_neighbours(torch.ones(2, 3), torch.ones(4, 3), k=1, **options)


@pytest.mark.parametrize(
    ("queries", "train", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), 5, "5 neighbours were asked for, but there are 4"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "0 neighbours"),
        (torch.ones(2, 3), torch.ones(4, 2), 1, "same width"),
        (torch.full((2, 3), torch.nan), torch.ones(4, 3), 1, "diverged"),
        (torch.ones(2, 3), torch.full((4, 3), torch.inf), 1, "diverged"),
        (torch.full((2, 3), 1e20), torch.full((4, 3), 1e20), 1, "overflow"),
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
